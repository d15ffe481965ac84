"""The result of a source's reader, one row per video, and readers of general sources: a folder, a CSV, a JSONL file.

A folder source has every video below it, by name. With ``frame_folder_fps`` it also has every folder below it that
contains frames (png or jpg) and no video file. A table has one video per row. ``path`` is a video file or a folder of
frames, absolute or relative to the table. Optional columns are ``caption``, ``class_label`` (an integer >= 0),
``class_name``, ``key``, ``start_s`` and ``end_s`` (seconds from the video's first frame) for a part of a video, and
``frame_folder_fps`` for a folder of frames. Other columns are for filters.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowception.codecs.frame_folder import is_frame
from flowception.errors import DataError

logger = logging.getLogger(__name__)
VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")


@dataclass
class SourceRows:
    """The videos of a source."""

    rows: list[dict[str, Any]]
    """``path``; optionally ``caption, class_label, class_name, key, start_s, end_s, frame_folder_fps``; and any other
    columns."""
    root: Path
    """Base of relative paths."""
    missing: list[str] = field(default_factory=list)
    """Videos that the data set lists but this copy lacks."""
    class_names: tuple[str, ...] = ()
    """All classes of the data set, in order of their numbers, if it defines them."""
    frame_folders: frozenset[str] = frozenset()
    """Paths known to be folders of frames."""


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        DataError: If it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); convert it, for example with iconv -t UTF-8") from error


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read the rows of a CSV file with a header, without empty cells.

    Args:
        path: The file.
        columns: Required columns.

    Yields:
        One dictionary per row.

    Raises:
        DataError: If a column is missing, or the file is not UTF-8.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    for column in columns:
        if column not in (reader.fieldnames or ()):
            raise DataError(f"{path} must have a column {column}, got {reader.fieldnames}")
    for row in reader:
        yield {name: value for name, value in row.items() if name is not None and value not in (None, "")}


def require_path(path: Path, source_format: str, wanted: str) -> Path:
    """Return the path if it exists; else raise ``DataError`` with what the format expects there."""
    if not path.exists():
        raise DataError(f"source_format {source_format}: {path} is missing; expected {wanted}")
    return path


def files_below(folder: Path) -> dict[str, str]:
    """Map the name of every file below a folder to its relative path. One listing makes a million lookups cheap.

    Among files with the same name the first is used: a folder's own files before those of its subfolders, sorted by
    name. So every task of a job array sees the same files. The number of other files is logged.
    """
    found, doubles = dict[str, str](), list[str]()
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.relpath(os.path.join(parent, name), folder)
            if found.setdefault(name, path) != path:
                doubles.append(path)
    if doubles:
        logger.info("%s: skipped %d files with the same name as another, such as %s", folder, len(doubles), doubles[0])
    return found


def read_folder(source: Path, frame_folder_fps: float | None = None) -> SourceRows:
    """All videos below a folder, with folders of frames if their frame rate is given."""
    found = [path for path in source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]
    if frame_folder_fps is not None:
        found += _frame_folders_below(source)
    return SourceRows([{"path": path.relative_to(source).as_posix()} for path in sorted(found)], source)


def _frame_folders_below(source: Path) -> list[Path]:
    """Folders with frames and without a video file; next to a video file, an image is a thumbnail."""
    return [
        Path(parent)
        for parent, _, names in os.walk(source)
        if Path(parent) != source
        and any(map(is_frame, names))
        and not any(name.lower().endswith(VIDEO_SUFFIXES) for name in names)
    ]


def read_csv_file(source: Path) -> SourceRows:
    """Read a CSV file with a header."""
    return SourceRows(list(read_csv(source, ["path"])), source.parent)


def read_jsonl_file(source: Path) -> SourceRows:
    """Read a file with one JSON object per line."""
    rows: list[dict[str, Any]] = []
    # Not splitlines, which also splits at U+2028, a character found in captions.
    for number, line in enumerate(read_text(source).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}, line {number} is not JSON ({error}); write one JSON object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number} must be a JSON object, got {type(row).__name__}")
        rows.append({name: value for name, value in row.items() if value is not None})
    return SourceRows(rows, source.parent)
