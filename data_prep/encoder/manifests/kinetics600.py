"""Kinetics-600: ten-second clips of 600 human actions, with the action as the class.

    SOURCE/annotations/train.csv             label, youtube_id, time_start, time_end, ... (or SOURCE/train.csv)
    SOURCE/train/ID_000012_000022.mp4 ...    the trimmed clips (or in a subfolder for their class)

``split`` is ``train`` (default), ``val``, or ``test``. Classes are numbered in alphabetical order of the annotation's
labels, independent of which clips could be downloaded. Many clips are no longer on YouTube; the missing ones are
listed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.encoder.manifests.rows import SourceRows, files_below, read_csv, require_path
from flowception.errors import DataError

FORMAT = "kinetics600"


def read(source: Path, split: str | None) -> SourceRows:
    """Read one split.

    Raises:
        DataError: If the layout differs; the message has the expected layout.
    """
    split = split or "train"
    annotation = source / "annotations" / f"{split}.csv"
    if not annotation.is_file():
        annotation = require_path(source / f"{split}.csv", FORMAT, f"{annotation}, or a table here with the labels")
    folder = require_path(source / split, FORMAT, "a folder of clips ID_START_END.mp4, six digits each")
    found = files_below(folder)
    listed = list(read_csv(annotation, ["label", "youtube_id", "time_start", "time_end"]))
    classes = tuple(sorted({str(row["label"]) for row in listed if "label" in row}))
    number = {name: label for label, name in enumerate(classes)}
    rows: list[dict[str, Any]] = []
    missing = []
    for line, row in enumerate(listed, start=1):
        name = _name_of(row, f"{annotation}, row {line}")
        if name not in found:
            missing.append(f"{split}/{name}")
            continue
        label = {"class_label": number[row["label"]], "class_name": row["label"]} if "label" in row else {}
        rows.append({"path": f"{split}/{found[name]}", **label})
    return SourceRows(rows, source, missing, classes)


def _name_of(row: dict[str, Any], where: str) -> str:
    try:
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        return f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
    except (KeyError, ValueError) as error:
        raise DataError(f"{where} must have youtube_id, and time_start and time_end in seconds, got {row}") from error
