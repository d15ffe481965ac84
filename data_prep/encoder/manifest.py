"""Reading a source into a list of videos to encode, in a fixed order, after filters.

``source_format`` sets the layout of a source; the readers in ``manifests/`` describe each format. Videos that a data
set lists but this copy lacks are counted and named, never silently skipped. Class names without numbers are numbered in
alphabetical order, before filters.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from data_prep.encoder.config import SourceFormat
from data_prep.encoder.filters import FilterCount, FilterRange, apply_filters
from data_prep.encoder.manifests import kinetics600, openvid, realestate10k, taichi
from data_prep.encoder.manifests.rows import VIDEO_SUFFIXES, SourceRows, read_csv_file, read_folder, read_jsonl_file
from data_prep.encoder.video_headers import HeaderReader
from flowception.codecs.video_file import no_rate
from flowception.errors import ConfigError, DataError
from flowception.ranges import one_of
from flowception.shards.schema import check_key

_DATA_SETS: dict[str, Callable[[Path, str | None], SourceRows]] = {
    module.FORMAT: module.read for module in (taichi, realestate10k, kinetics600, openvid)
}
_TABLES: dict[str, Callable[[Path], SourceRows]] = {
    "csv": read_csv_file,
    "jsonl": read_jsonl_file,
}
_FOLDER = "folder"
_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_MAX_STEM = 48
_CLIP_SUFFIX = "-0000"
_NAMED_MISSING = 5


@dataclass(frozen=True)
class VideoEntry:
    """One video to encode."""

    key: str
    """Prefix of the keys of the video's clips."""
    path: Path
    """Path of the file."""
    source: str
    """The path as written in the manifest; stored in the shards."""
    caption: str = ""
    class_label: int | None = None
    class_name: str | None = None
    start_s: float = 0.0
    """Seconds from the video's first frame; earlier frames are skipped."""
    end_s: float | None = None
    """Seconds from the video's first frame; frames at or after it are skipped. None is the video's end."""
    frame_folder_fps: float | None = None
    """Frames per second, if the video is a folder of frames."""


@dataclass(frozen=True)
class ManifestReport:
    """Counts of a source's videos: listed, missing, removed by filters, and kept."""

    source_format: str
    listed: int
    """Videos that the source lists."""
    missing: tuple[str, ...]
    """Listed videos whose files are missing."""
    filters: tuple[FilterCount, ...]
    kept: int

    def lines(self) -> list[str]:
        """A summary for people."""
        lines = [f"{self.source_format}: {self.listed} videos listed, {self.kept} to encode"]
        if self.missing:
            named = ", ".join(self.missing[:_NAMED_MISSING])
            lines.append(f"missing: {len(self.missing)}, such as {named}")
        return lines + [f"filter {count.describe()}" for count in self.filters]

    def to_json(self) -> str:
        """The report as JSON, with the number of missing videos instead of their names."""
        return json.dumps({**asdict(self), "missing": len(self.missing)}, indent=2) + "\n"


@dataclass(frozen=True)
class VideoManifest:
    """All videos of a source, in a fixed order."""

    entries: tuple[VideoEntry, ...]
    class_names: tuple[str, ...]
    """Name of each class; empty if no class has a name."""
    report: ManifestReport = field(compare=False)

    def sha256(self) -> str:
        """Hash of everything from the manifest that the shards depend on."""
        rows = [
            [e.key, e.source, e.caption, e.class_label, e.start_s, e.end_s]
            + ([e.frame_folder_fps] if e.frame_folder_fps is not None else [])  # so that older sets keep their hash
            for e in self.entries
        ]
        return hashlib.sha256(json.dumps([rows, list(self.class_names)]).encode()).hexdigest()


def read_source(
    source: str | Path,
    source_format: SourceFormat = "auto",
    split: str | None = None,
    filters: Mapping[str, FilterRange] | None = None,
    frame_folder_fps: float | None = None,
    headers: HeaderReader | None = None,
) -> VideoManifest:
    """Read a source.

    Args:
        source: Folder or file.
        source_format: Its layout; ``auto`` detects a folder, a ``.csv``, or a ``.jsonl``.
        split: Split of a data set; None is its training split.
        filters: Ranges by column.
        frame_folder_fps: Frames per second of folders of frames for which the source has no rate.
        headers: Reader of file headers for filters; None reads them for this call only.

    Returns:
        The entries, in the order of the source (sorted for a folder).

    Raises:
        DataError: If the source does not exist, is malformed, has no videos, or has one video twice, or if a folder of
            frames has no frame rate.
        ConfigError: If the format, the split, or a filter's column does not exist.
    """
    source = Path(source)
    chosen = _guess_format(source) if source_format == "auto" else source_format
    found = _read_rows(source, chosen, split, frame_folder_fps)
    entries = [
        _entry(row, found, frame_folder_fps, f"{source}, video {number}")
        for number, row in enumerate(found.rows, start=1)
    ]
    if not entries:
        reason = f"all {len(found.missing)} listed videos are missing" if found.missing else "no videos found"
        raise DataError(
            f"source {source} (read as {chosen}): {reason}; files must end in one of {' '.join(VIDEO_SUFFIXES)}; "
            "folders of frames must be below the source and need frame_folder_fps"
        )
    _refuse_doubles(entries)
    entries, class_names = _number_classes(entries)
    videos = [(entry.path, entry.frame_folder_fps) for entry in entries]
    kept, counts = apply_filters(found.rows, videos, dict(filters or {}), headers or HeaderReader())
    if not kept:
        reasons = "; ".join(count.describe() for count in counts)
        raise DataError(f"the filters remove every video of {source} ({reasons}); widen a filter")
    listed = len(entries) + len(found.missing)
    report = ManifestReport(chosen, listed, tuple(found.missing), tuple(counts), len(kept))
    return VideoManifest(tuple(entries[k] for k in kept), found.class_names or class_names, report)


def _guess_format(source: Path) -> str:
    if source.is_dir():
        return _FOLDER
    if not source.is_file():
        raise DataError(f"source {source} does not exist; give a folder of videos, a .csv or a .jsonl file")
    if source.suffix.lower() in _SUFFIXES:
        return _SUFFIXES[source.suffix.lower()]
    raise DataError(f"source must be a folder of videos, a .csv or a .jsonl file, got {source}")


def _read_rows(source: Path, source_format: str, split: str | None, frame_folder_fps: float | None) -> SourceRows:
    if not source.exists():
        raise DataError(f"source {source} does not exist; give the path of a {source_format} source")
    if source_format in _DATA_SETS:
        return _DATA_SETS[source_format](source, split)
    one_of(get_args(SourceFormat)).check("source_format", source_format)
    if split is not None:
        raise ConfigError(f"split must be null for source_format {source_format}, which has no splits, got {split!r}")
    if source.is_dir() != (source_format == _FOLDER):
        kind = "file" if source.is_dir() else "folder"
        raise DataError(f"source must be a {kind} for source_format {source_format}, got {source}")
    return read_folder(source, frame_folder_fps) if source.is_dir() else _TABLES[source_format](source)


def _entry(row: dict[str, Any], found: SourceRows, frame_folder_fps: float | None, where: str) -> VideoEntry:
    if not isinstance(row.get("path"), str):
        raise DataError(f"{where}: path must be the video's file name, got {row.get('path')!r}")
    label = row.get("class_label")
    try:
        label = None if label is None else int(label)
    except (TypeError, ValueError):
        label = -1
    if label is not None and label < 0:
        raise DataError(f"{where}: class_label must be an integer >= 0, got {row['class_label']!r}; or give class_name")
    start_s, end_s = _number(row, "start_s", where) or 0.0, _number(row, "end_s", where)
    if start_s < 0 or (end_s is not None and end_s <= start_s):
        raise DataError(f"{where}: start_s and end_s must satisfy 0 <= start_s < end_s, got {start_s} and {end_s}")
    named = row["path"] if "start_s" not in row else f"{row['path']}@{start_s}"
    key = str(row.get("key") or make_key(row["path"], named))
    check_key(key + _CLIP_SUFFIX)
    name, path = row.get("class_name"), found.root / row["path"]
    return VideoEntry(
        key=key,
        path=path,
        source=row["path"],
        caption=str(row.get("caption", "")),
        class_label=label,
        class_name=None if name is None else str(name),
        start_s=start_s,
        end_s=end_s,
        frame_folder_fps=_frame_rate(row, path, row["path"] in found.frame_folders, frame_folder_fps, where),
    )


def _frame_rate(row: dict[str, Any], path: Path, is_folder: bool, given: float | None, where: str) -> float | None:
    """Frame rate to use if the path is a folder of frames; None without one. Video files are recognized by suffix."""
    fps = _number(row, "frame_folder_fps", where, "frames per second")
    if fps is not None and not 0 < fps < math.inf:
        raise DataError(f"{where}: frame_folder_fps must be a number > 0 (frames per second), got {fps}")
    fps = given if fps is None else fps
    if fps is None and (is_folder or (path.suffix.lower() not in VIDEO_SUFFIXES and path.is_dir())):
        raise DataError(f"{where}: {no_rate(path)}")
    return fps


def _number(row: dict[str, Any], name: str, where: str, unit: str = "seconds") -> float | None:
    try:
        return None if row.get(name) is None else float(row[name])
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {name} must be a number ({unit}), got {row[name]!r}") from error


def make_key(path: str, named: str | None = None) -> str:
    """A valid key: the readable part of a path, plus a hash of ``named`` or the path that makes it unique."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", path.rsplit(".", 1)[0])[-_MAX_STEM:]
    return f"{stem}-{hashlib.blake2b((named or path).encode(), digest_size=5).hexdigest()}"


def _refuse_doubles(entries: Iterable[VideoEntry]) -> None:
    seen: dict[str, VideoEntry] = {}
    for entry in entries:
        other = seen.setdefault(entry.key, entry)
        if other is not entry:
            raise DataError(f"videos {other.source} and {entry.source} share key {entry.key}; list each video once")


def _number_classes(entries: list[VideoEntry]) -> tuple[list[VideoEntry], tuple[str, ...]]:
    """Number the classes if they have names only, and make the list of class names."""
    if any(e.class_label is None and e.class_name is not None for e in entries):
        both = next((e for e in entries if e.class_label is not None), None)
        if both is not None:
            raise DataError(
                f"{both.source} has a class_label, but other videos have only a class_name; give class_label to all "
                "videos or to none"
            )
        names = sorted({e.class_name for e in entries if e.class_name is not None})
        number = {name: label for label, name in enumerate(names)}
        entries = [replace(e, class_label=number[e.class_name]) if e.class_name else e for e in entries]
    name_of: dict[int, str] = {}
    for entry in entries:
        if entry.class_label is not None and entry.class_name is not None:
            known = name_of.setdefault(entry.class_label, entry.class_name)
            if known != entry.class_name:
                raise DataError(
                    f"class_label {entry.class_label} must have one class_name, got {known} and {entry.class_name}"
                )
    highest = max((e.class_label for e in entries if e.class_label is not None), default=-1)
    table = tuple(name_of.get(label, f"class_{label}") for label in range(highest + 1)) if name_of else ()
    return entries, table
