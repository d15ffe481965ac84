"""General sources: a folder of videos, a CSV or a JSONL file.

A folder gives every video below it, by name; with ``frame_folder_fps`` also every folder below it that has frames (png
or jpg) and no video file. A file has one video a row: ``path`` (of a video file or a folder of frames, relative to the
table, or absolute) and, if you have them, ``caption``, ``class_label`` (a number from 0), ``class_name``, ``key``,
``start_s`` and ``end_s`` (seconds from the video's first frame) where a row is a part of a video, and
``frame_folder_fps`` for a folder of frames. Other columns are for filters.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_prep.manifests.rows import VIDEO_SUFFIXES, SourceRows, read_csv, read_text
from flowception.codecs.frame_folder import is_frame
from flowception.errors import DataError


def read_folder(source: Path, frame_folder_fps: float | None = None) -> SourceRows:
    """All videos below a folder; folders of frames count where their rate is known."""
    found = [path for path in source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]
    if frame_folder_fps is not None:
        found += _frame_folders_below(source)
    return SourceRows([{"path": path.relative_to(source).as_posix()} for path in sorted(found)], source)


def _frame_folders_below(source: Path) -> list[Path]:
    """Folders with frames; beside a video file an image is a thumbnail."""
    return [
        Path(parent)
        for parent, _, names in os.walk(source)
        if Path(parent) != source
        and any(map(is_frame, names))
        and not any(name.lower().endswith(VIDEO_SUFFIXES) for name in names)
    ]


def read_csv_file(source: Path) -> SourceRows:
    """A CSV file with a header."""
    return SourceRows(list(read_csv(source, ["path"])), source.parent)


def read_jsonl_file(source: Path) -> SourceRows:
    """A file with one JSON object a line."""
    rows: list[dict[str, Any]] = []
    # Not splitlines, which also ends a line at U+2028, a character that captions hold.
    for number, line in enumerate(read_text(source).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}, line {number} is not JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number} is a {type(row).__name__}; write one object a line")
        rows.append({name: value for name, value in row.items() if value is not None})
    return SourceRows(rows, source.parent)
