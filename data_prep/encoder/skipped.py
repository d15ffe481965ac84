"""What a shard leaves out, in files beside it: videos that gave no clip, and pieces dropped of the others.

``shard-NNNNNN.unreadable.jsonl`` has a line with the reason for each such video, ``shard-NNNNNN.dropped.json`` a number
for each setting that drops pieces. Both are on disk before the shard counts as finished. Sets begun before pieces were
counted have finished shards without the second file; what these dropped is not known.
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
_NOT_COUNTED = "shards_not_counted"


@dataclass(frozen=True)
class DroppedPieces:
    """Pieces that are no clips, of videos that gave others."""

    pieces: Counter[str]
    """By the setting that dropped them, one of ``DROP_REASONS``."""
    shards_not_counted: int = 0
    """Finished shards of which nothing is known."""

    def lines(self) -> list[str]:
        """For people; nothing if there is nothing to say."""
        said = [f"{count} pieces of these videos were dropped by {name}" for name, count in sorted(self.pieces.items())]
        if self.shards_not_counted:
            number = f"{self.shards_not_counted} shard{'s' * (self.shards_not_counted != 1)}"
            said.append(f"dropped pieces are not known of {number} that an earlier version encoded")
        return said

    def to_json(self) -> str:
        """For machines; shards without a count are named only where there are some."""
        numbers = {reason: self.pieces[reason] for reason in DROP_REASONS}
        if self.shards_not_counted:
            numbers[_NOT_COUNTED] = self.shards_not_counted
        return json.dumps(numbers) + "\n"


def write_left_out(folder: Path, shard: int, unreadable: str, dropped: Counter[str]) -> None:
    """Put both files of a shard on disk."""
    write_atomically(_path(folder, shard, UNREADABLE_NAME), unreadable)
    write_atomically(_path(folder, shard, DROPPED_NAME), DroppedPieces(dropped).to_json())


def read_unreadable(folder: Path, shards: Iterable[int]) -> str:
    """The lines of some finished shards, one for each video that gave no clip."""
    return "".join(_path(folder, shard, UNREADABLE_NAME).read_text() for shard in shards)


def read_dropped(folder: Path, shards: Iterable[int]) -> DroppedPieces:
    """What some finished shards dropped."""
    pieces, not_counted = Counter[str](), 0
    for shard in shards:
        try:
            pieces.update(json.loads(_path(folder, shard, DROPPED_NAME).read_text()))
        except FileNotFoundError:
            not_counted += 1
    return DroppedPieces(+pieces, not_counted)


def _path(folder: Path, shard: int, name: str) -> Path:
    return folder / f"shard-{shard:06d}.{name}"
