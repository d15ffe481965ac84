"""What a reader of a data set gives, rows of one video each, and the general sources: a folder, a CSV or a JSONL file.

A folder gives every video below it, by name; with ``frame_folder_fps`` also every folder below it that has frames (png
or jpg) and no video file. A file has one video a row: ``path`` (of a video file or a folder of frames, relative to the
table, or absolute) and, if you have them, ``caption``, ``class_label`` (a number from 0), ``class_name``, ``key``,
``start_s`` and ``end_s`` (seconds from the video's first frame) where a row is a part of a video, and
``frame_folder_fps`` for a folder of frames. Other columns are for filters.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowception.codecs.frame_folder import is_frame
from flowception.errors import DataError

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")


@dataclass
class SourceRows:
    """The videos of a source."""

    rows: list[dict[str, Any]]
    """``path`` and optionally ``caption, class_label, class_name, key, start_s, end_s, frame_folder_fps``; any other
    column too."""
    root: Path
    """What relative paths are relative to."""
    missing: list[str] = field(default_factory=list)
    """What the data set lists and this copy of it lacks."""
    class_names: tuple[str, ...] = ()
    """All classes of the data set, in order of their numbers, where it says so itself."""
    frame_folders: frozenset[str] = frozenset()
    """Paths of which the reader has seen that they are folders of frames."""


def read_text(path: Path) -> str:
    """A text file whole.

    Raises:
        DataError: If it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); convert it, for example with iconv -t UTF-8") from error


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file with a header; empty cells are left out.

    Args:
        path: The file.
        columns: Columns that it must have.

    Yields:
        One dictionary a row.

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
    """The path itself, or an error that says what the format expects there."""
    if not path.exists():
        raise DataError(f"source_format {source_format}: {path} is missing; expected {wanted}")
    return path


def files_below(folder: Path) -> dict[str, str]:
    """Every file below a folder: name to path relative to it. One listing, so that a million look-ups are cheap.

    Of files of one name the first counts, a folder's own before those of its sub-folders, all in order of their names:
    every task of a job array sees the same. How many others there are is printed.
    """
    found, doubles = dict[str, str](), list[str]()
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.relpath(os.path.join(parent, name), folder)
            if found.setdefault(name, path) != path:
                doubles.append(path)
    if doubles:
        print(
            f"{folder}: skipped {len(doubles)} files with the same name as another, such as {doubles[0]}",
            flush=True,
        )
    return found


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
            raise DataError(f"{source}, line {number} is not JSON ({error}); write one JSON object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number} must be a JSON object, got {type(row).__name__}")
        rows.append({name: value for name, value in row.items() if value is not None})
    return SourceRows(rows, source.parent)
