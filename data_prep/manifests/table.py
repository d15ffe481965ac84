"""General sources: a folder of videos, a CSV or a JSONL file.

A folder gives every video below it, by name. A file has one video a row: ``path`` (relative to the file, or absolute)
and, if you have them, ``caption``, ``class_label`` (a number from 0), ``class_name``, ``key``, and ``start_s`` and
``end_s`` (seconds from the video's first frame) where a row is a part of a video. Other columns are for filters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.manifests.rows import VIDEO_SUFFIXES, SourceRows, read_csv, read_text
from flowception.errors import DataError


def read_folder(source: Path) -> SourceRows:
    """All videos below a folder."""
    found = (path for path in source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    return SourceRows([{"path": path.relative_to(source).as_posix()} for path in sorted(found)], source)


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
