"""Videos stored as a folder of images, one per frame: lists the frames in order and reads them.

Frames are in natural order of their names: ``frame_10.png`` follows ``frame_9.png``. Gaps in the numbering are not
detected. Other files in the folder are ignored.

Shape legend: a frame is a uint8 ``[H, W, 3]`` RGB array.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowception.errors import DataError

FRAME_SUFFIXES = (".jpeg", ".jpg", ".png")
_READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors that Pillow raises for damaged images, depending on the damage."""


def is_frame(name: str) -> bool:
    """Whether a file name is that of a frame; hidden files are not frames."""
    return name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")


def frame_paths(folder: Path) -> list[Path]:
    """The frames of a folder, in order.

    Raises:
        DataError: If there are none or the folder cannot be listed.
    """
    try:
        names = [path.name for path in folder.iterdir() if is_frame(path.name)]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from error
    if not names:
        raise DataError(f"{folder} contains no frames; put {' '.join(FRAME_SUFFIXES)} files in it")
    return [folder / name for name in sorted(names, key=_natural)]


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that orders digits as numbers; names that differ only in leading zeros stay distinct."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if part.isdecimal() else part for part in parts], name


def read_frame(path: Path) -> NDArray[np.uint8]:
    """Read a frame, uint8 [H, W, 3], dropping transparency.

    Raises:
        DataError: If it cannot be read, or does not have 8 bits per channel.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise DataError(f"frame {path} must have 8 bits per channel, got mode {image.mode}; convert it")
            return np.asarray(image.convert("RGB"))
    except _READ_ERRORS as error:
        raise DataError(unreadable(path, error)) from error


def unreadable(path: Path, error: Exception) -> str:
    """The message for a frame that Pillow cannot read."""
    return f"frame {path} cannot be read ({type(error).__name__}: {error}); replace the file"


def read_frame_size(path: Path) -> tuple[int, int]:
    """Height and width of a frame, from the file's header.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return image.height, image.width
    except _READ_ERRORS as error:
        raise DataError(unreadable(path, error)) from error
