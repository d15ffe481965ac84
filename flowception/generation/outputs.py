"""Files that a job writes next to its clips: ``clips.jsonl`` and ``contact.png``, or its part of them.

Several jobs can make one set (``slurm/generate.sh``). Job k of n makes batches k, k + n, k + 2 n, ... and writes
``part_0000_of_0004.jsonl`` and ``part_0000_of_0004.png``. The last job to finish joins the parts into ``clips.jsonl``,
which does not exist before, unless the folder still contains the parts of an earlier set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowception.errors import ConfigError
from flowception.files import FileLock, write_atomically
from flowception.generation.clip import condition_of
from flowception.generation.video import Video, write_contact_sheet

LIST_NAME = "clips.jsonl"


def first_clips(num_clips: int, batch_size: int, part: int, num_parts: int) -> range:
    """Number of the first clip of every batch that a job makes.

    Jobs share batches, not clips: a batch contains the same clips for any number of jobs, so every clip is bitwise the
    same.
    """
    return range(part * batch_size, num_clips, num_parts * batch_size)


def check_part(part: int, num_parts: int) -> None:
    """Check that ``part`` is one of ``num_parts`` jobs.

    Raises:
        ConfigError: Naming both numbers.
    """
    if num_parts < 1 or not 0 <= part < num_parts:
        raise ConfigError(f"`part` must be >= 0 and less than `num_parts`, got {part} and {num_parts}")


def _part_path(folder: Path, part: int, num_parts: int) -> Path:
    return folder / f"part_{part:04d}_of_{num_parts:04d}.jsonl"


def begin_lists(folder: Path, part: int, num_parts: int) -> None:
    """Delete the lists of an earlier job that this job will write again."""
    for path in (folder / LIST_NAME, _part_path(folder, part, num_parts)):
        path.unlink(missing_ok=True)


def write_lists(
    folder: Path, part: int, num_parts: int, records: Sequence[dict[str, Any]], videos: Sequence[Video]
) -> Path:
    """Write a job's clip list and contact sheet; once all jobs have done so, write the list of the set.

    Args:
        folder: Folder of the clips.
        part: Index of the job, from 0.
        num_parts: Number of jobs that make the set.
        records: One record per clip, in the order of clips.
        videos: Pixels of the clips.

    Returns:
        Path of the contact sheet; a job without clips does not write one.
    """
    path = folder / LIST_NAME if num_parts == 1 else _part_path(folder, part, num_parts)
    sheet = folder / "contact.png" if num_parts == 1 else path.with_suffix(".png")
    if videos:
        write_contact_sheet(sheet, videos, [_contact_label(record) for record in records])
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
    if num_parts > 1:
        with FileLock(folder / ".clips.lock", ConfigError, wait=True):
            _join(folder, num_parts)
    return sheet


def _join(folder: Path, num_parts: int) -> None:
    """Write the list of the set, in the order of clips, if every part exists."""
    parts = [_part_path(folder, part, num_parts) for part in range(num_parts)]
    if all(path.is_file() for path in parts):
        lines = [line for path in parts for line in path.read_text().splitlines(keepends=True)]
        write_atomically(folder / LIST_NAME, "".join(sorted(lines, key=lambda line: _number(json.loads(line)))))


def _number(record: dict[str, Any]) -> int:
    """A clip's number."""
    return int(record["file"].removesuffix(".mp4").removeprefix("clip_"))


def _contact_label(record: dict[str, Any]) -> str:
    condition = condition_of(record["prompt"], record["class_name"], record["class_label"])
    return f"{_number(record):04d} {record['task']} {condition}".rstrip()
