"""Context sources: image and video files, arrays, tensors and PIL images behind one interface.

Shape legend: ``n`` pixel frames, ``H`` and ``W`` pixels. Pixels are uint8 RGB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flowception.codecs.video_file import decode_frames, resample
from flowception.errors import DataError
from flowception.generation.video import Video, read_first_frame

ContextItem = str | os.PathLike[str] | NDArray[np.uint8] | Tensor | Image.Image
"""Path of an image or video; array or tensor, uint8 ``[H, W, 3]`` or ``[n, H, W, 3]``; or PIL image."""


@dataclass(frozen=True)
class FileSource:
    """An image or video file."""

    path: Path

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"context file {self.path}"

    @property
    def is_image(self) -> bool:
        """Whether it is a still image."""
        try:
            with Image.open(self.path) as image:
                return getattr(image, "n_frames", 1) == 1
        except OSError:  # not an image: PIL's UnidentifiedImageError is one of these
            return False

    def first_frame(self) -> NDArray[np.uint8]:
        """The image, or the video's first frame, uint8 ``[H, W, 3]``.

        Raises:
            DataError: If the file is missing, or is neither an image nor a video.
        """
        return read_first_frame(self.path)

    def frames(self, fps: float | None) -> Iterator[NDArray[np.uint8]]:
        """The video's frames, uint8 ``[H, W, 3]`` each.

        Args:
            fps: Frames per second to resample to; None keeps all frames.
        """
        return (frame.image for frame in resample(decode_frames(self.path), fps))


@dataclass(frozen=True)
class PixelSource:
    """An image or video in memory; a video is assumed to have the training frame rate."""

    name: str
    """Name for messages."""
    is_image: bool
    pixels: Video = field(repr=False)
    """uint8 ``[n, H, W, 3]``."""

    def first_frame(self) -> NDArray[np.uint8]:
        """The image, or the video's first frame, uint8 ``[H, W, 3]``."""
        return self.pixels[0]

    def frames(self, fps: float | None) -> Iterator[NDArray[np.uint8]]:
        """The video's frames, uint8 ``[H, W, 3]`` each, never resampled."""
        return iter(self.pixels)


ContextSource = FileSource | PixelSource


def context_sources(context: ContextItem | Sequence[ContextItem] | None) -> list[ContextSource]:
    """Wrap context items as sources.

    Args:
        context: One item or several; None for no context.

    Returns:
        One source per item. Files are not opened yet.

    Raises:
        DataError: If an item is not a path, image or video.
    """
    if context is None:
        return []
    items: Sequence[Any] = context if isinstance(context, list | tuple) else [context]
    return [_source(item, number) for number, item in enumerate(items)]


def _source(item: Any, number: int) -> ContextSource:
    if isinstance(item, str | os.PathLike):
        return FileSource(Path(item))
    if isinstance(item, Image.Image):
        item = np.asarray(item.convert("RGB"))
    name = f"context item {number}"
    if isinstance(item, Tensor):
        if item.dtype != torch.uint8:
            raise DataError(f"{name} must be uint8 RGB, got a tensor of {item.dtype} {list(item.shape)}")
        item = item.detach().cpu().numpy()
    if not isinstance(item, np.ndarray):
        raise DataError(f"{name} must be a path, an array, a tensor or a PIL image, got {type(item).__name__}")
    if item.dtype != np.uint8 or item.ndim not in (3, 4) or item.shape[-1] != 3 or not item.size:
        raise DataError(
            f"{name} must be uint8 RGB, [H, W, 3] for an image or [n, H, W, 3] for a video, got {item.dtype} "
            f"{list(item.shape)}"
        )
    is_image = item.ndim == 3
    return PixelSource(f"{name} (uint8 {list(item.shape)})", is_image, item[None] if is_image else item)
