"""Heartbeats of the ranks, one small file each in ``heartbeats/`` of the run directory, and the hang report.

Threads of ``training.distributed.watchdog`` write and read them without collectives, so they work when every collective
hangs. A job that hung leaves ``report.txt`` there, with the ranks that were behind, and the stacks of every rank that
could still write. The next job renames that folder to ``hang_1``, ``hang_2``, ...
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from flowception.errors import RunDirectoryError

REPORT = "report.txt"
_RANKS_NAMED = 16
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class Beat:
    """Heartbeat of a rank."""

    rank: int
    time_s: float
    """Wall-clock time of writing; an old heartbeat is from a process that is stopped, dead or disconnected."""
    turn: int
    """Phases started and ended so far. All ranks run the same phases, so the rank with the fewest is behind."""
    phase: str
    step: int
    idle_s: float
    """Seconds since it started this phase or ended the previous one."""
    where: str
    """Innermost stack frame of its main thread."""
    in_collective: bool
    """Whether its main thread is inside a collective."""
    gpu_is_busy: bool
    """Whether its GPU has work left, which may be a collective. Set once a hang is suspected."""
    hung: bool
    """Whether it has written its stacks."""
    host: str
    process: int

    @property
    def waits(self) -> bool:
        """Whether it may be waiting for other ranks."""
        return self.in_collective or self.gpu_is_busy

    def describe(self) -> str:
        """Describe the rank's progress in one line."""
        busy = ", its GPU is busy" * self.gpu_is_busy
        return f"step {self.step}, {self.phase}, no progress for {self.idle_s:.0f} s, at {self.where}{busy}"


def folder_of(run_dir: str | Path) -> Path:
    """Folder of a run's heartbeats."""
    return Path(run_dir) / "heartbeats"


def begin(run_dir: str | Path) -> None:
    """Create an empty folder. Files of an earlier job are removed, or renamed if they report a hang.

    Raises:
        RunDirectoryError: If the folder cannot be created.
    """
    folder = folder_of(run_dir)
    try:
        if (folder / REPORT).exists():
            names = (folder.with_name(f"hang_{number}") for number in itertools.count(1))
            folder.rename(next(name for name in names if not name.exists()))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot create {folder} ({error}); free disk space or choose another run_dir"
        ) from error


def path_of(folder: Path, rank: int) -> Path:
    """File of a rank's heartbeat."""
    return folder / f"rank_{rank:05d}.json"


def write(folder: Path, beat: Beat) -> None:
    """Write a rank's heartbeat atomically, without syncing it to disk."""
    path = path_of(folder, beat.rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(beat)))
    partial.replace(path)


def read(folder: Path, rank: int) -> Beat | None:
    """Read a rank's heartbeat; None if it has none."""
    try:
        return Beat(**json.loads(path_of(folder, rank).read_text()))
    except FileNotFoundError:
        return None


def main_thread() -> tuple[str, bool]:
    """Innermost stack frame of this process's main thread, and whether it is in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no Python code", False
    where = f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
    return where, any(part in name for name in _files(frame) for part in _COLLECTIVES)


def _files(frame: FrameType | None) -> list[str]:
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return files


def all_stacks() -> str:
    """Python stacks of all threads of this process, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        stack = "".join(traceback.format_stack(frame))
        parts.append(f"thread {names.get(ident, ident)}, innermost call last:\n{stack}")
    return "\n".join(parts)


def own_name() -> tuple[str, int]:
    """Host name and process id."""
    return socket.gethostname(), os.getpid()


def stacks_of(folder: Path, rank: int) -> Path:
    """File of a rank's stacks after a hang."""
    return folder / f"rank_{rank:05d}.stacks.txt"


def report(beats: Mapping[int, Beat | None], silent: Collection[int]) -> str:
    """Report which ranks are behind, and what the others wait for.

    The ranks without a recent heartbeat are behind. If there are none, it is the ranks that have entered the fewest
    phases. If all are in the same phase, it is the ranks that do not wait for another rank: on CUDA, those with an idle
    GPU. If all GPUs are busy, no rank can be named.

    Args:
        beats: Newest heartbeat of every rank; None for a rank without one.
        silent: Ranks without a recent heartbeat, including those that have none.

    Returns:
        Several lines; the first names the ranks.
    """
    beating = {rank: beat for rank, beat in beats.items() if beat is not None and rank not in silent}
    turns = {beat.turn for beat in beating.values()}
    behind = list(silent)
    if not behind and len(turns) > 1:
        behind = [rank for rank, beat in beating.items() if beat.turn == min(turns)]
    elif not behind:
        behind = [rank for rank, beat in beating.items() if not beat.waits]
    everyone = "all ranks wait for each other" + " or for a GPU" * any(beat.gpu_is_busy for beat in beating.values())
    lines = [f"hang: {_ranks(behind)} behind" if behind else f"hang: {everyone}"]
    for rank in behind or beating:
        beat = beats[rank]
        if beat is None:
            lines.append(f"rank {rank} has never written a heartbeat")
        else:
            age_s = time.time() - beat.time_s
            heart = f" no heartbeat for {age_s:.0f} s (the process is stopped, dead or disconnected); last seen at"
            lines.append(
                f"rank {rank} (process {beat.process} on {beat.host}):{heart * (rank in silent)} {beat.describe()}"
            )
    waiting = [beat for rank, beat in beating.items() if behind and rank not in behind]
    if waiting:
        lines.append(f"{len(waiting)} other ranks wait, such as rank {waiting[0].rank}: {waiting[0].describe()}")
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_RANKS_NAMED])) + (", ..." if len(ranks) > _RANKS_NAMED else "")
    return f"rank {named} is" if len(ranks) == 1 else f"{len(ranks)} ranks ({named}) are"
