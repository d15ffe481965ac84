"""Hooks in a forked rank: inject faults at counted places, and record what the rank trains on.

A place is where events are counted, from 1, in each rank:

* ``forward``, ``backward``: a module's forward begins; the gradient of a module's output arrives;
* ``reduction``, ``gather``: a collective of DeepSpeed begins, or has ended;
* ``optimizer``: a step of the optimizer begins, or has ended (ZeRO-3 takes one for each parameter group);
* ``batch``: the trainer takes a step's packs, so event k comes before step k's forward pass;
* ``load``: a slice of a checkpoint is read;
* ``save:N``: an operation on the files of checkpoints, from the first that names step N to that of a later step;
* ``files``: one on the files right in the run's directory: its description, its lock, its metrics.

Operations are mkdir, opening for writing, write, fsync, rename, unlink and rmdir. They are caught where Python hands
them to the system (``os``, ``io.open``, safetensors' ``serialize_file``), in whatever thread. ``strace`` of a save has
the same ones in the same order, but for four in safetensors (open, ftruncate, write, rename), which are one write here.

An injection fires at one event of one rank. It notes that first, so a fault that did not happen is seen.
"""

from __future__ import annotations

import builtins
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP_PLACES = ("forward", "backward", "reduction", "optimizer", "gather")
_REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "all_to_all")
_GATHERS = ("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "broadcast")
_NO_SPACE_NEEDED = ("unlink", "rmdir")
_PAUSE_TIMEOUT_S = 120.0
_HIDDEN_NAME = ".tmpFAULTS"
"""Temporary name that safetensors writes to and then renames; a write is cut under either name."""
_ATTEMPT = re.compile(r"\.[0-9a-f]{8}-\d+(?=\.tmp)")
"""Random part of the folder of a save attempt, which would make two runs of the benchmark differ."""


@dataclass(frozen=True)
class Injection:
    """One fault."""

    place: str
    at: int
    """Number of the event."""
    rank: int
    action: str
    """``kill``; ``cut``: a partial write, then kill; ``full_disk``: ENOSPC; ``signal``; ``pause``."""
    operation: str = ""
    """Description of the event, for the record."""
    fraction: float = 0.5
    """Share that ``cut`` and ``full_disk`` write."""
    events: int = 1
    """Consecutive events that ``full_disk`` affects."""
    number: int = signal.SIGUSR1
    """Signal of ``signal``."""
    after: int | None = None
    """Number of another injection of the job, on whatever rank, that this one waits for."""


class Hooks:
    """Counts events in one rank and fires its injections."""

    def __init__(
        self, rank: int, run_dir: Path, notes: Path, injections: tuple[Injection, ...] = (), record: bool = False
    ) -> None:
        """Prepare the hooks; ``install`` activates them.

        Args:
            rank: This rank.
            run_dir: The run directory.
            notes: Folder for records: ``fired-I``, ``consumed.jsonl``, ``events-RANK.jsonl``.
            injections: Faults of all ranks.
            record: Record every event with its file operation.
        """
        self.rank, self.run_dir, self.notes = rank, Path(os.path.abspath(run_dir)), notes
        self._injections = [(i, injection) for i, injection in enumerate(injections) if injection.rank == rank]
        self._record = record
        self._counts: Counter[str] = Counter()
        self._saving_step = -1
        self._os_open, self._os_write, self._io_open, self._rename = os.open, os.write, io.open, os.rename

    def install(self) -> None:
        """Activate the hooks."""
        self._watch_consumption()
        self._watch_modules()
        self._watch_collectives()
        self._watch_files()

    def event(self, place: str, operation: str = "", cut: Callable[[float], None] | None = None) -> None:
        """Count an event and fire the injections there.

        Args:
            place: Name of the place.
            operation: The operation that follows.
            cut: Performs a given share of it.
        """
        self._counts[place] += 1
        at = self._counts[place]
        if self._record:
            self._note(f"events-{self.rank}.jsonl", [place, operation])
        for index, injection in self._injections:
            if injection.place == place and injection.at <= at < injection.at + injection.events:
                self._fire(index, injection, operation, cut)

    def _fire(
        self, index: int, injection: Injection, operation: str, cut: Callable[[float], None] | None = None
    ) -> None:
        if injection.action == "full_disk" and operation.split(" ")[0] in _NO_SPACE_NEEDED:
            return
        self._note(f"fired-{index}", operation)
        if injection.after is not None:
            _wait_for(self.notes / f"fired-{injection.after}")
        if injection.action == "signal":
            os.kill(os.getpid(), injection.number)
        elif injection.action == "pause":
            _wait_for(self.notes / "release")
        else:
            if cut is not None and injection.action != "kill":
                cut(injection.fraction)
            if injection.action == "full_disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, name: str, content: Any) -> None:
        """Append a line in a single write, which a kill cannot truncate."""
        descriptor = self._os_open(self.notes / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._os_write(descriptor, (json.dumps(content) + "\n").encode())
        os.close(descriptor)

    def _watch_consumption(self) -> None:
        """Record the keys and a digest of every pack when the trainer receives it."""
        from flowception.checkpoint.reader import SliceReader
        from flowception.data.loader import PackLoader

        steps, read = PackLoader.__iter__, SliceReader.read

        def iterate(loader: PackLoader) -> Iterator[Any]:
            for batch in steps(loader):
                self.event("batch")
                world_size = int(os.environ["WORLD_SIZE"])
                for micro_step, pack in enumerate(batch.packs):
                    number = micro_step * world_size + self.rank
                    if number < len(batch.step_plan.packs):
                        place = [batch.cursor.epoch, batch.cursor.step, number]
                        self._note("consumed.jsonl", [place, list(pack.keys), digest(pack)])
                yield batch

        def read_slice(*arguments: Any, **named: Any) -> Any:
            self.event("load")
            return read(*arguments, **named)

        PackLoader.__iter__ = iterate  # type: ignore[method-assign]
        SliceReader.read = read_slice  # type: ignore[method-assign]

    def _watch_modules(self) -> None:
        import torch
        from torch.nn.modules import module
        from torch.optim import optimizer

        def forward_begins(*_: Any) -> None:
            self.event("forward")

        def forward_ended(_module: Any, _inputs: Any, output: Any) -> None:
            for part in output if isinstance(output, tuple) else (output,):
                if isinstance(part, torch.Tensor) and part.requires_grad:
                    part.register_hook(lambda _gradient: self.event("backward"))

        module.register_module_forward_pre_hook(forward_begins)
        module.register_module_forward_hook(forward_ended)
        optimizer.register_optimizer_step_pre_hook(lambda *_: self.event("optimizer"))
        optimizer.register_optimizer_step_post_hook(lambda *_: self.event("optimizer"))

    def _watch_collectives(self) -> None:
        from deepspeed.comm.torch import TorchBackend

        for place, names in (("reduction", _REDUCTIONS), ("gather", _GATHERS)):
            for name in names:
                setattr(TorchBackend, name, self._around(place, getattr(TorchBackend, name)))

    def _around(self, place: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            self.event(place, "begins")
            result = call(*arguments, **named)
            self.event(place, "ended")
            return result

        return watched

    def _watch_files(self) -> None:
        for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "fdatasync"):
            setattr(os, name, self._before(name, getattr(os, name)))
        self._watch_opening()
        self._watch_safetensors()

    def _watch_opening(self) -> None:
        def open_file(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.file_event("open", self._resolve(path, named.get("dir_fd")))
            return self._os_open(path, flags, *arguments, **named)

        def open_stream(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            stream_path = None if isinstance(path, int) else self._resolve(path, None)
            writes = any(letter in mode for letter in "wax+")
            if stream_path is None or not writes or self._place(stream_path) is None:
                return self._io_open(path, mode, *arguments, **named)
            self.file_event("open", stream_path)
            return _WatchedStream(self._io_open(path, mode, *arguments, **named), stream_path, self)

        for module, watched in ((os, open_file), (io, open_stream), (builtins, open_stream)):
            setattr(module, "open", watched)  # noqa: B010

    def _watch_safetensors(self) -> None:
        import safetensors
        import safetensors.torch

        serialize, rename = safetensors.torch.serialize_file, self._rename

        def serialize_file(content: Any, path: Any, *arguments: Any, **named: Any) -> None:
            def cut(share: float) -> None:
                serialize(content, path, *arguments, **named)
                os.truncate(path, int(os.path.getsize(path) * share))
                if share < 0.5:
                    rename(path, Path(path).with_name(_HIDDEN_NAME))

            try:
                self.file_event("write", Path(path), cut)
            except OSError as error:  # as the library reports it
                raise safetensors.SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from error
            serialize(content, path, *arguments, **named)

        setattr(safetensors.torch, "serialize_file", serialize_file)  # noqa: B010

    def _before(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *arguments: Any, **named: Any) -> Any:
            self.file_event("unlink" if name == "remove" else name, self._resolve(path, named.get("dir_fd")))
            return call(path, *arguments, **named)

        return watched

    @staticmethod
    def _resolve(path: Any, folder: int | None) -> Path:
        """The path of an operation's first argument: a path, one in an open folder, or an open file."""
        if isinstance(path, int):
            return Path(os.readlink(f"/proc/self/fd/{path}"))
        name = os.fsdecode(path)
        return Path(name) if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}"), name)

    def _place(self, path: Path) -> str | None:
        """Place of a file: ``checkpoints``, ``files`` for those directly in the run directory, or None.

        Files in other folders are written by time, not by step, so their operations cannot be counted.
        """
        absolute = Path(os.path.abspath(path))
        if absolute.is_relative_to(self.run_dir / "checkpoints"):
            return "checkpoints"
        return "files" if absolute.parent == self.run_dir else None

    def file_event(self, operation: str, path: Path, cut: Callable[[float], None] | None = None) -> None:
        """Count an operation on a file of the run."""
        place = self._place(path)
        what = f"{operation} {_ATTEMPT.sub('', path.name)}"
        if place == "files":
            self.event("files", what, cut)
        if place == "checkpoints":
            named = re.search(r"/step_(\d{8,})", str(path))
            self._saving_step = max(self._saving_step, int(named[1]) if named else -1)
            self.event(f"save:{self._saving_step}", what, cut)


class _WatchedStream:
    """A stream open for writing."""

    def __init__(self, stream: Any, path: Path, hooks: Hooks) -> None:
        self._stream, self._path, self._hooks = stream, path, hooks

    def write(self, content: Any) -> int:
        def cut(share: float) -> None:
            self._stream.write(content[: int(len(content) * share)])
            self._stream.flush()

        self._hooks.file_event("write", self._path, cut)
        return int(self._stream.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def __enter__(self) -> _WatchedStream:
        self._stream.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._stream.__exit__(*reason)


def digest(pack: Any) -> str:
    """16 hex digits over all tensors of a pack."""
    import torch

    total = hashlib.sha256()

    def add(part: Any) -> None:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if dataclasses.is_dataclass(value):
                add(value)
            elif isinstance(value, torch.Tensor):
                total.update(f"{field.name}{value.dtype}{tuple(value.shape)}".encode())
                total.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)

    add(pack)
    return total.hexdigest()[:16]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _PAUSE_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {_PAUSE_TIMEOUT_S:.0f} s")
        time.sleep(0.01)
