"""Tai-Chi-HD (Siarohin et al., first-order-model), as written by its ``load_videos.py``.

    SOURCE/train/ID#...#000123#000456.mp4 ...     cropped clips; the same in test/
    SOURCE/taichi-metadata*.csv                   optional: video_id, start, end, fps, ..., partition; for finding
                                                  missing clips

With ``--format .mp4`` a clip is a file. By default it is a folder of frames ``0000000.png ...`` with the same name. The
frame rate of a folder is ``fps`` of the metadata, else the key ``frame_folder_fps``. ``split`` is ``train`` (default)
or ``test``. There are no captions and no classes. The metadata provides the column ``frames`` for filters.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_prep.encoder.manifests.rows import SourceRows, read_csv, require_path
from flowception.errors import DataError

FORMAT = "taichi"


def read(source: Path, split: str | None) -> SourceRows:
    """Read one partition.

    Raises:
        DataError: If the layout differs; the message has the expected layout.
    """
    split = split or "train"
    folder = require_path(source / split, FORMAT, "clips made by load_videos.py")
    with os.scandir(folder) as found:
        is_folder = {e.name: e.is_dir() for e in found if e.is_dir() or e.name.lower().endswith(".mp4")}
    if not is_folder:
        raise DataError(f"source_format {FORMAT}: {folder} has neither .mp4 files nor folders of frames")
    listed: dict[str, dict[str, Any]] = {}
    for metadata in sorted(source.glob("taichi-metadata*.csv")):
        listed |= {_stem_of(row): row for row in _rows(metadata) if row["partition"] == split}
    rows = [_row(split, name, is_folder[name], listed.get(_without_suffix(name))) for name in sorted(is_folder)]
    missing = sorted(f"{split}/{stem}.mp4" for stem in listed.keys() - set(map(_without_suffix, is_folder)))
    folders = frozenset(f"{split}/{name}" for name in is_folder if is_folder[name])
    return SourceRows(rows, source, missing, frame_folders=folders)


def _row(split: str, name: str, is_folder: bool, about: dict[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"path": f"{split}/{name}"}
    if about is not None:
        row["frames"] = int(about["end"]) - int(about["start"])
        if is_folder and "fps" in about:
            row["frame_folder_fps"] = about["fps"]
    return row


def _rows(metadata: Path) -> list[dict[str, Any]]:
    rows = list(read_csv(metadata, ["video_id", "start", "end", "partition"]))
    for number, row in enumerate(rows, start=1):
        if not (str(row.get("start", "")).isdigit() and str(row.get("end", "")).isdigit() and "partition" in row):
            raise DataError(f"{metadata}, row {number} must have integers start and end and a partition, got {row}")
    return rows


def _stem_of(row: dict[str, Any]) -> str:
    """Name of a clip: the parts of its id in reverse order, then its first and last frame."""
    video = "#".join(str(row["video_id"]).split("#")[::-1])
    return f"{video}#{int(row['start']):06d}#{int(row['end']):06d}"


def _without_suffix(name: str) -> str:
    return name.rsplit(".", 1)[0]
