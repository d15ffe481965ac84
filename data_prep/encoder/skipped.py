"""What a shard leaves out, in files beside it: videos that gave no clip, and pieces dropped of the others.

``shard-NNNNNN.unreadable.jsonl`` has a line with the reason for each such video, ``shard-NNNNNN.dropped.json`` a number
for each setting that drops pieces. Both are on disk before the shard counts as finished.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_prep.encoder.clip_cutter import DROP_REASONS
from flowception.files import write_atomically

UNREADABLE_NAME, DROPPED_NAME = "unreadable.jsonl", "dropped.json"
"""The same for the whole set, when it is finished."""


@dataclass(frozen=True)
class DroppedPieces:
    """Pieces that are no clips, of videos that gave others."""

    pieces: Counter[str]
    """By the setting that dropped them, one of ``DROP_REASONS``."""

    def lines(self) -> list[str]:
        """For people; nothing if there is nothing to say."""
        return [f"{name} dropped {count} pieces of these videos" for name, count in sorted(self.pieces.items())]

    def to_json(self) -> str:
        """For machines."""
        return json.dumps({reason: self.pieces[reason] for reason in DROP_REASONS}) + "\n"


def write_skipped(folder: Path, shard: int, unreadable: str, dropped: Counter[str]) -> None:
    """Put both files of a shard on disk."""
    write_atomically(_path(folder, shard, UNREADABLE_NAME), unreadable)
    write_atomically(_path(folder, shard, DROPPED_NAME), DroppedPieces(dropped).to_json())


def read_unreadable(folder: Path, shards: Iterable[int]) -> str:
    """The lines of some finished shards, one for each video that gave no clip."""
    return "".join(_path(folder, shard, UNREADABLE_NAME).read_text() for shard in shards)


def read_dropped(folder: Path, shards: Iterable[int]) -> DroppedPieces:
    """What some finished shards dropped."""
    pieces = Counter[str]()
    for shard in shards:
        pieces.update(json.loads(_path(folder, shard, DROPPED_NAME).read_text()))
    return DroppedPieces(+pieces)


def _path(folder: Path, shard: int, name: str) -> Path:
    return folder / f"shard-{shard:06d}.{name}"
