"""Records of what a shard skips, in files next to it: videos without a clip, and dropped pieces of the others.

``shard-NNNNNN.unreadable.jsonl`` has one line per video without a clip, with the reason. ``shard-NNNNNN.dropped.json``
has the number of dropped pieces by setting. Both are on disk before the shard counts as finished.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_prep.encoder.clip_cutter import DROP_REASONS
from flowception.errors import DataError
from flowception.files import write_atomically

UNREADABLE_NAME, DROPPED_NAME = "unreadable.jsonl", "dropped.json"
"""Names of the files for the complete set, written when it is finished."""


@dataclass(frozen=True)
class DroppedPieces:
    """Counts of dropped pieces, of videos that have other clips."""

    pieces: Counter[str]
    """By the setting that dropped them, one of ``DROP_REASONS``."""

    def lines(self) -> list[str]:
        """A summary for people; empty if nothing was dropped."""
        return [f"{name} dropped {count} pieces of these videos" for name, count in sorted(self.pieces.items())]

    def to_json(self) -> str:
        """The counts as JSON, by setting."""
        return json.dumps({reason: self.pieces[reason] for reason in DROP_REASONS}) + "\n"


def write_skipped(folder: Path, shard: int, unreadable: str, dropped: Counter[str]) -> None:
    """Write both files of a shard."""
    write_atomically(_path(folder, shard, UNREADABLE_NAME), unreadable)
    write_atomically(_path(folder, shard, DROPPED_NAME), DroppedPieces(dropped).to_json())


def read_unreadable(folder: Path, shards: Iterable[int]) -> str:
    """The lines of some finished shards, one per video without a clip.

    Raises:
        DataError: If a shard's list cannot be read.
    """
    return "".join(_read(_path(folder, shard, UNREADABLE_NAME)) for shard in shards)


def read_dropped(folder: Path, shards: Iterable[int]) -> DroppedPieces:
    """The summed counts of some finished shards.

    Raises:
        DataError: If a shard's counts cannot be read.
    """
    pieces = Counter[str]()
    for shard in shards:
        path = _path(folder, shard, DROPPED_NAME)
        try:
            pieces.update(json.loads(_read(path)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); delete the files of this shard and encode again") from error
    return DroppedPieces(+pieces)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} ({error}); delete the files of its shard and encode again") from error


def _path(folder: Path, shard: int, name: str) -> Path:
    return folder / f"shard-{shard:06d}.{name}"
