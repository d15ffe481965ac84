"""Saves checkpoints beside training, which waits only while each rank copies its part to host memory.

All ranks call ``Saver.begin`` at the same steps. Each copies its slices to a buffer of its own and goes on training,
while a thread writes them, then a receipt; rank 0's thread waits for all receipts, commits, and prunes
(``checkpoint.writer``). There are no collectives: what a rank has to say to rank 0 lies in the attempt's folder, whose
name no other attempt has. One save is under way at a time: the next one first waits for its own rank's part of it,
rank 0 for the commit, which comes or fails within ``checkpoint.save_timeout_s``.

A save that fails is a warning and a count. It ends nothing and removes no other checkpoint.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowception.checkpoint import format as checkpoint_format
from flowception.checkpoint import writer
from flowception.checkpoint.format import KINDS
from flowception.errors import CheckpointError
from flowception.training.distributed.collectives import broadcast_object, mark_on_all_ranks
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.resume import CheckpointConfig

logger = logging.getLogger(__name__)

_LEAVING_TIMEOUT_S = 30.0
"""How long a job that ends with an error still waits for the receipts of others."""
_PIECE_ELEMENTS = 2**26
"""Elements of a piece of the host's memory (256 MiB). torch rounds what it pins up to a power of two, which can nearly
double a single large buffer."""


def lay_out(sizes: Sequence[int], piece_elements: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Divide vectors over pieces of memory, none of them over two.

    Args:
        sizes: Elements of each vector.
        piece_elements: Elements of a piece; a longer vector has a piece of its own.

    Returns:
        Piece and offset of each vector, and the elements used of each piece.
    """
    places, used = list[tuple[int, int]](), list[int]()
    for size in sizes:
        if not used or used[-1] + size > piece_elements:
            used.append(0)
        places.append((len(used) - 1, used[-1]))
        used[-1] += size
    return places, used


class HostCopy:
    """This rank's slices in host memory; the same memory is filled again for each save."""

    def __init__(self, shards: ShardedState) -> None:
        """Take the memory, piece by piece, pinned where the state lives on a GPU."""
        self._shards = shards
        self.ranges: dict[str, tuple[tuple[int, ...], int, int]] = {}
        """Parameter to (full shape, start, stop)."""
        for fragment in shards.fragments:
            start, stop = shards.saved_range(fragment)
            if stop > start:
                self.ranges[fragment.name] = (fragment.shape, start, stop)
        sizes = {f"{kind}/{name}": stop - start for kind in KINDS for name, (_, start, stop) in self.ranges.items()}
        places, used = lay_out(list(sizes.values()), _PIECE_ELEMENTS)
        pieces = [torch.empty(elements, pin_memory=shards.device.type == "cuda") for elements in used]
        self.tensors: dict[str, Tensor] = {
            title: pieces[piece][offset : offset + size]
            for (title, size), (piece, offset) in zip(sizes.items(), places, strict=True)
        }
        """``KIND/PARAMETER`` to its part of the memory, float32 ``[stop - start]``."""

    @torch.no_grad()
    def fill(self) -> None:
        """Copy the state as it is now; on return it may change."""
        for kind in KINDS:
            for fragment, view in self._shards.views(kind):
                if fragment.name in self.ranges:
                    _, start, stop = self.ranges[fragment.name]
                    here = view[start - fragment.start : stop - fragment.start]
                    self.tensors[f"{kind}/{fragment.name}"].copy_(here, non_blocking=True)
        if self._shards.device.type == "cuda":
            torch.cuda.current_stream(self._shards.device).synchronize()


class _Saved(NamedTuple):
    """What a thread that finished its part has to say."""

    seconds: float
    """Since the save began."""
    warning: str | None


class _Attempt(NamedTuple):
    """A save under way."""

    step: int
    result: Future[_Saved]


class Saver:
    """Saves a run's checkpoints. Every rank has one, and calls the same methods in the same order."""

    def __init__(self, run_dir: str | Path, config: CheckpointConfig, shards: ShardedState) -> None:
        """Clear what killed jobs left, and take the memory for the copy. Collective; the run's lock is held.

        Args:
            run_dir: The run.
            config: How many checkpoints are kept, and how long a save may take.
            shards: This rank's part of the training state.
        """
        self.saved_step: int | None = None
        """Newest step known to be saved: on rank 0 at once, on the others after ``wait``. Set it after resuming."""
        self.failed_saves = 0
        """Saves that failed since the job's start; known like ``saved_step``."""
        self.failure: str | None = None
        """Why the last save failed; None if it did not. Known like ``saved_step``."""
        self._run_dir, self._config, self._shards = run_dir, config, shards
        if shards.rank == 0:
            self._remove_leftovers()
        self._job: str = broadcast_object(secrets.token_hex(4))
        self._attempts = 0
        self._copy = HostCopy(shards)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._leaving = Event()
        self._under_way: _Attempt | None = None
        self._abandoned: list[Path] = []
        self._metrics: dict[str, float] = {}

    def _remove_leftovers(self) -> None:
        try:
            writer.remove_leftovers(self._run_dir)
        except OSError as error:
            logger.warning("cannot remove the files of an unfinished save (%s)", error)

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Copy this rank's part and let it be saved in the background. No collectives.

        Args:
            step: Optimizer steps done.
            state: JSON-able state of the run, the same on all ranks; it may not change afterwards.
        """
        began_s = time.perf_counter()
        self._settle()
        self._attempts += 1
        folder = writer.attempt_dir(self._run_dir, step, f"{self._job}-{self._attempts}")
        self._copy.fill()
        shards = self._shards
        numbers = {
            "optimizer_steps": shards.optimizer_steps,
            "world_size": shards.world_size,
            "zero_stage": shards.stage,
        }
        result = self._thread.submit(self._save, folder, step, state | numbers, began_s)
        self._under_way = _Attempt(step, result)
        self._metrics["save_blocked_s"] = time.perf_counter() - began_s

    def wait(self) -> int | None:
        """Wait for the save under way, if there is one, and learn how it went. Collective.

        Returns:
            The newest step known to be saved, the same on all ranks; ``failure`` says why the last one was not.
        """
        self._settle()
        self.saved_step, self.failed_saves, self.failure = broadcast_object(
            (self.saved_step, self.failed_saves, self.failure)
        )
        return self.saved_step

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Save and wait. Collective.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: On all ranks, if one of them could not write.
        """
        self.begin(step, state)
        self.wait()
        if self.failure is not None:
            raise mark_on_all_ranks(CheckpointError(self.failure))
        return checkpoint_format.checkpoint_dir(self._run_dir, step)

    def poll(self) -> dict[str, float]:
        """Metrics for the step just done; warns of a save that has failed since the last call.

        Returns:
            ``failed_saves``; ``save_blocked_s`` in the step after a save began, ``save_s`` after it was committed.
        """
        if self._under_way is not None and self._under_way.result.done():
            self._settle()
        metrics, self._metrics = self._metrics, {}
        return {"failed_saves": self.failed_saves} | metrics

    def close(self) -> None:
        """End the thread; after an error the save under way may still finish, but waits no longer for other ranks."""
        self._leaving.set()
        self._settle()
        self._thread.shutdown()

    def _settle(self) -> None:
        """Wait for this rank's thread, note what became of the save, and warn of a failure."""
        attempt, self._under_way = self._under_way, None
        if attempt is None:
            return
        warning: str | None
        try:
            saved = attempt.result.result()
        except CheckpointError as error:
            warning = self._note_failure(attempt.step, error)
        else:
            warning = saved.warning
            if self._shards.rank == 0:
                self.saved_step, self.failure = attempt.step, None
                self._metrics["save_s"] = saved.seconds
        if warning is not None:
            logger.warning("%s", warning)

    def _note_failure(self, step: int, error: CheckpointError) -> str:
        """Count a failed save; on other ranks than 0 ``wait`` sets it right. Returns the warning."""
        self.failed_saves += 1
        self.failure = f"cannot save the checkpoint of step {step}: {error}"
        last = "no earlier one exists" if self.saved_step is None else f"the newest is of step {self.saved_step}"
        return f"{self.failure}; {last}"

    def _save(self, folder: Path, step: int, state: dict[str, Any], began_s: float) -> _Saved:
        """Write this rank's part; on rank 0 finish the checkpoint. In the thread."""
        warning = None
        try:
            self._write_part(folder)
            if self._shards.rank == 0:
                warning = self._finish(folder, step, state)
        except (OSError, ValueError, CheckpointError) as error:
            if self._shards.rank == 0:
                writer.discard(folder)
                self._abandoned.append(folder)
            raise CheckpointError(str(error)) from error
        return _Saved(time.perf_counter() - began_s, warning)

    def _write_part(self, folder: Path) -> None:
        rank = self._shards.rank
        try:
            writer.make(folder)
            writer.write_slices(folder, rank, self._copy.tensors, self._copy.ranges)
        except (OSError, CheckpointError) as error:
            try:
                writer.write_failure(folder, rank, str(error))
            except OSError:  # no room for that either; rank 0 will wait in vain
                raise error from None

    def _finish(self, folder: Path, step: int, state: dict[str, Any]) -> str | None:
        """Wait for all ranks, commit and prune. Returns a warning if old checkpoints could not be removed."""
        config = self._config
        receipts = writer.wait_for_receipts(folder, self._shards.world_size, self._timeout_s)
        while self._abandoned:  # no rank still writes to an earlier attempt: it has finished this one
            writer.discard(self._abandoned.pop())
        writer.commit(folder, step, receipts, state)
        try:
            writer.prune(self._run_dir, step, config.keep_last, config.keep_every_steps)
        except OSError as error:
            return f"cannot remove old checkpoints ({error})"
        return None

    def _timeout_s(self) -> float:
        limit_s = self._config.save_timeout_s
        return min(limit_s, _LEAVING_TIMEOUT_S) if self._leaving.is_set() else limit_s
