"""Heartbeats of the ranks: one small file each in ``heartbeats/`` of the run directory, and who is behind by them.

Written and read by threads of ``training.distributed.watchdog`` without a collective, so they work when every
collective hangs. A job that gave up leaves ``report.txt`` there, which says who was behind, and the stacks of every
rank that could still write; the next job renames that folder to ``hang_1``, ``hang_2``, ...
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import sys
import threading
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
    """What a rank says about itself."""

    rank: int
    time_s: float
    """Time of day when it was written; an old one is of a process that is stopped, dead or cut off."""
    turn: int
    """Phases begun and ended so far. All ranks have the same ones, so the rank with the fewest is behind."""
    phase: str
    step: int
    idle_s: float
    """Seconds since it began the phase, or ended the one before."""
    where: str
    """Innermost line of its main thread."""
    in_collective: bool
    """Whether its main thread waits for other ranks."""
    gpu_is_busy: bool
    """Whether its GPU has work left, which may be a collective. Known once a hang is suspected."""
    hung: bool
    """Whether it has written down its stacks."""
    host: str
    process: int

    @property
    def waits(self) -> bool:
        """Whether it may be other ranks that it waits for."""
        return self.in_collective or self.gpu_is_busy

    def describe(self) -> str:
        """For a person."""
        busy = ", its GPU is busy" * self.gpu_is_busy
        return f"step {self.step}, {self.phase}, no progress for {self.idle_s:.0f} s, at {self.where}{busy}"


def folder_of(run_dir: str | Path) -> Path:
    """Where a run's heartbeats are."""
    return Path(run_dir) / "heartbeats"


def begin(run_dir: str | Path) -> None:
    """Make an empty folder; what an earlier job left is removed, or set aside if it tells of a hang.

    Raises:
        RunDirectoryError: If it cannot be made.
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
    """A rank's heartbeat."""
    return folder / f"rank_{rank:05d}.json"


def write(folder: Path, beat: Beat) -> None:
    """Write a rank's heartbeat, whole or not at all; it need not survive a crash of the machine."""
    path = path_of(folder, beat.rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(beat)))
    partial.replace(path)


def read(folder: Path, rank: int) -> Beat | None:
    """A rank's heartbeat; None if it has none."""
    try:
        return Beat(**json.loads(path_of(folder, rank).read_text()))
    except FileNotFoundError:
        return None


def main_thread() -> tuple[str, bool]:
    """The innermost line of this process's main thread, and whether it is in a collective."""
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
    """The Python stacks of every thread of this process, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        stack = "".join(traceback.format_stack(frame))
        parts.append(f"thread {names.get(ident, ident)}, innermost call last:\n{stack}")
    return "\n".join(parts)


def own_name() -> tuple[str, int]:
    """Host and process."""
    return socket.gethostname(), os.getpid()


def stacks_of(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it gives up."""
    return folder / f"rank_{rank:05d}.stacks.txt"


def report(beats: Mapping[int, Beat | None], silent: Collection[int]) -> str:
    """Who is behind, and what the others wait for.

    Behind are the ranks whose heart has stopped; else those that have entered the fewest phases; else, where all are in
    the same one, those that wait for no other rank. On CUDA that is a rank whose GPU is idle; where all are busy, none
    can be named.

    Args:
        beats: The newest heartbeat of every rank; None for a rank that has none.
        silent: Ranks whose heart has stopped, those without a heartbeat among them.

    Returns:
        Some lines, the first of which names the ranks.
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
            heart = " no recent heartbeat (the process is stopped, dead or disconnected); last seen at" * (
                rank in silent
            )
            lines.append(f"rank {rank} (process {beat.process} on {beat.host}):{heart} {beat.describe()}")
    waiting = [beat for rank, beat in beating.items() if behind and rank not in behind]
    if waiting:
        lines.append(f"{len(waiting)} other ranks wait, such as rank {waiting[0].rank}: {waiting[0].describe()}")
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_RANKS_NAMED])) + (", ..." if len(ranks) > _RANKS_NAMED else "")
    return f"rank {named} is" if len(ranks) == 1 else f"{len(ranks)} ranks ({named}) are"
