"""Which videos to encode: a folder, a CSV file or a JSONL file becomes a list of entries.

A manifest has one video a row. Columns (CSV) or fields (JSONL): ``path`` (relative to the manifest, or absolute), and
optionally ``caption``, ``class_label`` (a number from 0), ``class_name`` and ``key``; others are ignored. Class names
without numbers are numbered in alphabetical order.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowception.data.schema import check_key
from flowception.errors import DataError

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
_MAX_STEM = 48
_CLIP_SUFFIX = "-0000"


@dataclass(frozen=True)
class VideoEntry:
    """One video to encode."""

    key: str
    """Start of the keys of the video's clips."""
    path: Path
    """Where the file is."""
    source: str
    """The path as the manifest has it; written into the shards."""
    caption: str = ""
    class_label: int | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class Manifest:
    """All videos of a source, in a fixed order."""

    entries: tuple[VideoEntry, ...]
    class_names: tuple[str, ...]
    """Name of each class number; empty if no class has a name."""

    def sha256(self) -> str:
        """Hash of everything that goes from the manifest into the shards."""
        rows = [[e.key, e.source, e.caption, e.class_label] for e in self.entries]
        return hashlib.sha256(json.dumps([rows, list(self.class_names)]).encode()).hexdigest()


def read_manifest(source: str | Path) -> Manifest:
    """Read a folder (all videos below it, by name), a ``.csv`` or a ``.jsonl``.

    Args:
        source: Folder or file.

    Returns:
        The entries, in the folder's sorted order or the file's own.

    Raises:
        DataError: If the source does not exist, is malformed, or names no video or one video twice.
    """
    source = Path(source)
    if source.is_dir():
        found = (path for path in source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
        rows = [{"path": path.relative_to(source).as_posix()} for path in sorted(found)]
        root = source
    elif not source.is_file():
        raise DataError(f"source {source} does not exist; give a folder of videos, a .csv or a .jsonl file")
    elif source.suffix.lower() == ".csv":
        rows, root = _read_csv(source), source.parent
    elif source.suffix.lower() in (".jsonl", ".ndjson"):
        rows, root = _read_jsonl(source), source.parent
    else:
        raise DataError(f"source {source} is a {source.suffix or 'nameless'} file; give a folder, a .csv or a .jsonl")
    entries = [_entry(row, root, f"{source}, video {number}") for number, row in enumerate(rows, start=1)]
    if not entries:
        raise DataError(f"source {source} names no video; files must end in one of {' '.join(VIDEO_SUFFIXES)}")
    _refuse_doubles(entries)
    return _number_classes(entries)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "path" not in (reader.fieldnames or ()):
            raise DataError(f"{path} has the columns {reader.fieldnames}; one must be called path")
        return [{name: value for name, value in row.items() if value not in (None, "")} for row in reader]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is a {type(row).__name__}; write one object a line")
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def _entry(row: dict[str, Any], root: Path, where: str) -> VideoEntry:
    if not isinstance(row.get("path"), str):
        raise DataError(f"{where} has path {row.get('path')!r}; give the video's file name")
    label = row.get("class_label")
    try:
        label = None if label is None else int(label)
    except (TypeError, ValueError):
        label = -1
    if label is not None and label < 0:
        raise DataError(f"{where} has class_label {row['class_label']!r}; give a whole number from 0, or class_name")
    key = str(row.get("key") or make_key(row["path"]))
    check_key(key + _CLIP_SUFFIX)
    name = row.get("class_name")
    return VideoEntry(
        key=key,
        path=root / row["path"],
        source=row["path"],
        caption=str(row.get("caption", "")),
        class_label=label,
        class_name=None if name is None else str(name),
    )


def make_key(source: str) -> str:
    """A legal key made of a path: what is readable of its name, and a hash that keeps paths apart."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", source.rsplit(".", 1)[0])[-_MAX_STEM:]
    return f"{stem}-{hashlib.blake2b(source.encode(), digest_size=5).hexdigest()}"


def _refuse_doubles(entries: Iterable[VideoEntry]) -> None:
    seen: dict[str, VideoEntry] = {}
    for entry in entries:
        other = seen.setdefault(entry.key, entry)
        if other is not entry:
            raise DataError(f"videos {other.source} and {entry.source} have the key {entry.key}; name each video once")


def _number_classes(entries: list[VideoEntry]) -> Manifest:
    """Give numbers to names where they are missing, and make the table of names."""
    if any(e.class_label is None and e.class_name is not None for e in entries):
        both = next((e for e in entries if e.class_label is not None), None)
        if both is not None:
            raise DataError(f"{both.source} has a class_label and others have only a class_name; give all or none")
        names = sorted({e.class_name for e in entries if e.class_name is not None})
        number = {name: label for label, name in enumerate(names)}
        entries = [replace(e, class_label=number[e.class_name]) if e.class_name else e for e in entries]
    name_of: dict[int, str] = {}
    for entry in entries:
        if entry.class_label is not None and entry.class_name is not None:
            known = name_of.setdefault(entry.class_label, entry.class_name)
            if known != entry.class_name:
                raise DataError(f"class_label {entry.class_label} is called both {known} and {entry.class_name}")
    highest = max((e.class_label for e in entries if e.class_label is not None), default=-1)
    table = tuple(name_of.get(label, f"class_{label}") for label in range(highest + 1)) if name_of else ()
    return Manifest(tuple(entries), table)
