"""Tai-Chi-HD (Siarohin et al., first-order-model), as its ``load_videos.py --format .mp4`` leaves it.

    SOURCE/train/ID#...#000123#000456.mp4 ...     cropped clips; test/ likewise
    SOURCE/taichi-metadata*.csv                   optional: video_id, start, end, ..., partition; names what is missing

``split`` is ``train`` (default) or ``test``. There are no captions and no classes. From the metadata comes the column
``frames`` for filters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.manifests.rows import SourceRows, read_csv, require_path
from flowception.errors import DataError

FORMAT = "taichi"


def read(source: Path, split: str | None) -> SourceRows:
    """Read one partition.

    Raises:
        DataError: If the layout is another, saying what was expected.
    """
    split = split or "train"
    folder = require_path(source / split, FORMAT, "a folder of .mp4 clips made by load_videos.py --format .mp4")
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".mp4")
    if not names:
        frames = any(path.is_dir() for path in folder.iterdir())
        advice = "it holds folders of frames: run load_videos.py with --format .mp4" if frames else "it is empty"
        raise DataError(f"source_format {FORMAT}: {folder} has no .mp4 file; {advice}")
    listed: dict[str, dict[str, Any]] = {}
    for metadata in sorted(source.glob("taichi-metadata*.csv")):
        listed |= {_name_of(row): row for row in _rows(metadata) if row["partition"] == split}
    rows: list[dict[str, Any]] = []
    for name in names:
        about = listed.get(name)
        frames_of = {"frames": int(about["end"]) - int(about["start"])} if about else {}
        rows.append({"path": f"{split}/{name}", **frames_of})
    return SourceRows(rows, source, missing=sorted(f"{split}/{name}" for name in listed.keys() - set(names)))


def _rows(metadata: Path) -> list[dict[str, Any]]:
    rows = list(read_csv(metadata, ["video_id", "start", "end", "partition"]))
    for number, row in enumerate(rows, start=1):
        if not (str(row.get("start", "")).isdigit() and str(row.get("end", "")).isdigit() and "partition" in row):
            raise DataError(f"{metadata}, row {number}: start, end and partition must be set, the first two numbers")
    return rows


def _name_of(row: dict[str, Any]) -> str:
    """The file name of a clip: the parts of its id in reverse, then its first and last frame."""
    video = "#".join(str(row["video_id"]).split("#")[::-1])
    return f"{video}#{int(row['start']):06d}#{int(row['end']):06d}.mp4"
