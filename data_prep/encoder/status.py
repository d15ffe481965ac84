"""Progress of an encoding job from the set's folder alone, on any machine that sees the folder.

A shard is done when its part of the index exists, running while a job holds its lock, and failed if it is partially
written and not locked. Then its job was killed, or stopped with an error that is in its log; running the same job again
encodes it. The speed is measured over the last hour in which shards were finished.
"""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.encoder.encoder import SETTINGS_NAME, shard_lock
from data_prep.encoder.skipped import DroppedPieces, read_dropped, read_unreadable
from flowception.errors import DataError
from flowception.shards.schema import META_NAME
from flowception.shards.writer import shard_name

_SPEED_WINDOW_S = 3600.0
_SHOWN_FAILED = 10


@dataclass(frozen=True)
class EncodeStatus:
    """Counts over the complete set."""

    shards: int
    done: int
    running: tuple[int, ...]
    """Shards being written."""
    failed: tuple[int, ...]
    """Shards that a job started and no longer writes."""
    clips: int
    """Clips in finished shards."""
    unreadable: int
    """Videos without a clip, in finished shards."""
    dropped: DroppedPieces
    """Dropped pieces of the other videos, in finished shards."""
    clips_per_s: float | None
    """None until two shards are done."""
    seconds_left: float | None
    """Time for the remaining shards at that speed."""
    finished: bool
    """Whether the set is ready for training."""

    def describe(self) -> str:
        """A summary of a few lines."""
        waiting = self.shards - self.done - len(self.running) - len(self.failed)
        lines = [
            f"shards: {self.done} of {self.shards} done, {len(self.running)} running, {len(self.failed)} failed, "
            f"{waiting} waiting",
            f"clips: {self.clips} so far; {self.unreadable} videos unreadable",
            *self.dropped.lines(),
        ]
        if self.failed:
            named = ", ".join(map(str, self.failed[:_SHOWN_FAILED]))
            lines.append(f"failed: shards {named}; run the same command again to encode them")
        if self.finished:
            lines.append("the set is finished")
        elif self.done == self.shards:
            lines.append("all shards are done but the set is not finished; run the same command again")
        elif self.clips_per_s is None or self.seconds_left is None:
            lines.append("speed: unknown until two shards are done")
        else:
            idle = "" if self.running else "; nothing is running"
            lines.append(f"speed: {self.clips_per_s:.1f} clips/s, {_duration(self.seconds_left)} left{idle}")
        return "\n".join(lines)


def read_status(folder: Path) -> EncodeStatus:
    """Read the progress of a set from its folder.

    Raises:
        DataError: If no job was started there.
    """
    try:
        settings = json.loads((folder / SETTINGS_NAME).read_text())
        shards = -(-int(settings["videos"]) // int(settings["videos_per_shard"]))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no encoding job found in {folder} ({error}); start one, or set out to its folder") from error
    finished_at, clips_in = dict[int, float](), dict[int, int]()
    running, failed = list[int](), list[int]()
    for shard in range(shards):
        part = folder / f"shard-{shard:06d}.index.npz"
        if part.exists():
            finished_at[shard] = part.stat().st_mtime
            with np.load(part, allow_pickle=False) as arrays:
                clips_in[shard] = len(arrays["clips"])
        elif _is_locked(shard_lock(folder, shard)):
            running.append(shard)
        elif (folder / f".{shard_name(shard)}.partial").exists():
            failed.append(shard)
    speed = _clips_per_s(finished_at, clips_in)
    total = sum(clips_in.values())
    left = (shards - len(clips_in)) * total / max(1, len(clips_in))
    return EncodeStatus(
        shards=shards,
        done=len(clips_in),
        running=tuple(running),
        failed=tuple(failed),
        clips=total,
        unreadable=read_unreadable(folder, clips_in).count("\n"),
        dropped=read_dropped(folder, clips_in),
        clips_per_s=speed,
        seconds_left=left / speed if speed else None,
        finished=(folder / META_NAME).exists() and len(clips_in) == shards,
    )


def _clips_per_s(finished_at: dict[int, float], clips_in: dict[int, int]) -> float | None:
    """Clips of all shards in the window except the first, divided by the time since the first was done."""
    newest = max(finished_at.values(), default=0.0)
    recent = sorted((when, shard) for shard, when in finished_at.items() if newest - when <= _SPEED_WINDOW_S)
    if len(recent) < 2 or newest <= recent[0][0]:
        return None
    return sum(clips_in[shard] for _, shard in recent[1:]) / (newest - recent[0][0])


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
