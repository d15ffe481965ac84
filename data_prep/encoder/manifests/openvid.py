"""OpenVid-1M (Nan et al.): captioned clips with scores, as published on the Hugging Face hub, unpacked.

    SOURCE/data/train/OpenVid-1M.csv     video, caption, aesthetic score, motion score, ... (or SOURCE/OpenVid-1M.csv)
    SOURCE/video/NAME.mp4 ...            the clips, in any folder below SOURCE

``split`` is the name of the table: ``OpenVid-1M`` (default) or ``OpenVidHD``. Columns for filters (with spaces):
``aesthetic score``, ``motion score``, ``temporal consistency score``, ``frame``, ``fps``, ``seconds``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.encoder.manifests.rows import SourceRows, files_below, read_csv, require_path
from flowception.errors import DataError

FORMAT = "openvid"


def read(source: Path, split: str | None) -> SourceRows:
    """Read one table.

    Raises:
        DataError: If the layout differs; the message has the expected layout.
    """
    name = f"{split or 'OpenVid-1M'}.csv"
    table = source / "data" / "train" / name
    if not table.is_file():
        table = require_path(source / name, FORMAT, f"{table}, or a table here with columns video and caption")
    found = files_below(source)
    rows: list[dict[str, Any]] = []
    missing = []
    for number, row in enumerate(read_csv(table, ["video", "caption"]), start=1):
        video = row.pop("video", None)
        if video is None:
            raise DataError(f"{table}, row {number} must have a video, got none")
        if video in found:
            rows.append({**row, "path": found[video]})
        else:
            missing.append(video)
    return SourceRows(rows, source, missing)
