"""A video as a folder of images, one a frame: which these are, in their order, and reading one.

Frames are in natural order of their names, so that ``frame_10.png`` follows ``frame_9.png``. Numbers that are left out
between names are not noticed. Other files of the folder are passed over.

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
"""What Pillow raises at a damaged image, depending on where it is damaged."""


def is_frame(name: str) -> bool:
    """Whether a file's name is that of a frame; hidden files are none."""
    return name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")


def frame_paths(folder: Path) -> list[Path]:
    """The frames of a folder in their order.

    Raises:
        DataError: If there are none.
    """
    try:
        names = [path.name for path in folder.iterdir() if is_frame(path.name)]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from error
    if not names:
        raise DataError(f"{folder} contains no frames; put {' '.join(FRAME_SUFFIXES)} files in it")
    return [folder / name for name in sorted(names, key=_natural)]


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sorts digits as numbers; names that differ by leading zeros alone stay apart."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if part.isdecimal() else part for part in parts], name


def read_frame(path: Path) -> NDArray[np.uint8]:
    """One frame, uint8 [H, W, 3]; transparency is left out.

    Raises:
        DataError: If it cannot be read, or has no 8 bits a color.
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
