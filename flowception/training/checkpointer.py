"""Asynchronous checkpoint saving: training blocks only while each rank copies its part to host memory.

All ranks call ``Saver.begin`` at the same steps. Each rank copies its slices to its host buffer and continues training,
while a thread writes the slices and then a receipt. Rank 0's thread waits for all receipts, commits, and prunes
(``checkpoint.writer``). There are no collectives: ranks report to rank 0 through files in the folder of the attempt,
whose name is unique. Only one save runs at a time. The next one first waits for the previous one: each rank for its
own part, rank 0 for the commit, which succeeds or fails within ``checkpoint.save_timeout_s``.

A failed save is logged as a warning and counted. It does not stop training and removes no other checkpoint.
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
"""How long a job that ends with an error still waits for the receipts of other ranks."""
_PIECE_ELEMENTS = 2**26
"""Elements of one host memory buffer (256 MiB). torch rounds pinned allocations up to a power of two, which can nearly
double the size of a single large buffer."""


def lay_out(sizes: Sequence[int], piece_elements: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Assign vectors to memory buffers; no vector is split.

    Args:
        sizes: Elements of each vector.
        piece_elements: Elements of a buffer; a longer vector gets its own buffer.

    Returns:
        Buffer and offset of each vector, and the elements used of each buffer.
    """
    places, used = list[tuple[int, int]](), list[int]()
    for size in sizes:
        if not used or used[-1] + size > piece_elements:
            used.append(0)
        places.append((len(used) - 1, used[-1]))
        used[-1] += size
    return places, used


class HostCopy:
    """This rank's slices in host memory; every save reuses the same memory."""

    def __init__(self, shards: ShardedState) -> None:
        """Allocate the memory in several buffers, pinned if the state is on a GPU."""
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
        """``KIND/PARAMETER`` to its slice of the memory, float32 ``[stop - start]``."""

    @torch.no_grad()
    def fill(self) -> None:
        """Copy the current state. Once this returns, the state may change."""
        for kind in KINDS:
            for fragment, view in self._shards.views(kind):
                if fragment.name in self.ranges:
                    _, start, stop = self.ranges[fragment.name]
                    here = view[start - fragment.start : stop - fragment.start]
                    self.tensors[f"{kind}/{fragment.name}"].copy_(here, non_blocking=True)
        if self._shards.device.type == "cuda":
            torch.cuda.current_stream(self._shards.device).synchronize()


class _Saved(NamedTuple):
    """Result of a save thread that finished its part."""

    seconds: float
    """Since the save started."""
    warning: str | None


class _Attempt(NamedTuple):
    """A save in progress."""

    step: int
    result: Future[_Saved]


class Saver:
    """Saves a run's checkpoints. Every rank has one and calls the same methods in the same order."""

    def __init__(self, run_dir: str | Path, config: CheckpointConfig, shards: ShardedState) -> None:
        """Remove what killed jobs left, and allocate the memory for the copy. Collective; needs the run's lock.

        Args:
            run_dir: The run directory.
            config: How many checkpoints to keep, and how long a save may take.
            shards: This rank's part of the training state.
        """
        self.saved_step: int | None = None
        """Newest step known to be saved: up to date on rank 0, on the others after ``wait``. Set it after resuming."""
        self.failed_saves = 0
        """Saves that failed since the start of the job; as up to date as ``saved_step``."""
        self.failure: str | None = None
        """Why the last save failed; None if it did not. As up to date as ``saved_step``."""
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
        """Copy this rank's part and save it in the background. No collectives.

        Args:
            step: Optimizer steps done.
            state: JSON-serializable state of the run, the same on all ranks; do not modify it afterwards.
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
        """Wait for the save in progress, if any, and share its result. Collective.

        Returns:
            The newest step known to be saved, the same on all ranks; ``failure`` has the error of a failed save.
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
            CheckpointError: On all ranks, if any of them could not write.
        """
        self.begin(step, state)
        self.wait()
        if self.failure is not None:
            raise mark_on_all_ranks(CheckpointError(self.failure))
        return checkpoint_format.checkpoint_dir(self._run_dir, step)

    def poll(self) -> dict[str, float]:
        """Return metrics for the step just done, and warn if a save has failed since the last call.

        Returns:
            ``failed_saves``; ``save_blocked_s`` in the step after a save started; ``save_s`` after it was committed.
        """
        if self._under_way is not None and self._under_way.result.done():
            self._settle()
        metrics, self._metrics = self._metrics, {}
        return {"failed_saves": self.failed_saves} | metrics

    def close(self) -> None:
        """Stop the thread; a save in progress may finish, but waits at most ``_LEAVING_TIMEOUT_S`` for other ranks."""
        self._leaving.set()
        self._settle()
        self._thread.shutdown()

    def _settle(self) -> None:
        """Wait for this rank's thread, record the result of the save, and warn if it failed."""
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
        """Count a failed save (``wait`` corrects the count on ranks other than 0). Returns the warning."""
        self.failed_saves += 1
        self.failure = f"cannot save the checkpoint of step {step}: {error}"
        last = "no earlier one exists" if self.saved_step is None else f"the newest is of step {self.saved_step}"
        return f"{self.failure}; {last}"

    def _save(self, folder: Path, step: int, state: dict[str, Any], began_s: float) -> _Saved:
        """Write this rank's part, and on rank 0 finish the checkpoint. Runs in the thread."""
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
            except OSError:  # the failure cannot be written either, so rank 0 runs into its timeout
                raise error from None

    def _finish(self, folder: Path, step: int, state: dict[str, Any]) -> str | None:
        """Wait for all ranks, commit, and prune. Returns a warning if it cannot remove old checkpoints."""
        config = self._config
        receipts = writer.wait_for_receipts(folder, self._shards.world_size, self._timeout_s)
        while self._abandoned:  # every rank has finished this attempt, so none still writes to an earlier one
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
