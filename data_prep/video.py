"""Cuts a video file into clips: frame rate, size, length.

Frames are counted as they decode; what a file says of its own length is never used.

Shape legend: frames are uint8 ``[H, W, 3]``, a clip ``[n, H, W, 3]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowception.codecs.video_file import Frame, cover_and_crop, decode_frames, resample
from flowception.errors import DataError


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """How videos become clips."""

    fps: float | None = None
    """Frames per second of the clips; None keeps every frame."""
    height: int | None = None
    """Pixels; None keeps the video's own, down to a multiple of ``size_multiple``."""
    width: int | None = None
    """Likewise."""
    size_multiple: int = 1
    """Both sides of a clip are multiples of it."""
    min_frames: int = 1
    """A video's last piece is dropped below this."""
    max_frames: int | None = None
    """Videos are cut into pieces of this length; None keeps a video whole."""


@dataclass(frozen=True)
class CutClip:
    """A piece of a video."""

    frames: Frame
    """uint8 [n, H, W, 3]."""
    fps: float
    start_s: float
    """Seconds from the video's first frame."""


def cut_video(path: Path, settings: CutSettings) -> list[CutClip]:
    """Decode a video and cut it into clips.

    Args:
        path: Video file.
        settings: How to cut.

    Returns:
        At least one clip, in order.

    Raises:
        DataError: If the video cannot be decoded or is too short; the message is the reason to record.
    """
    clips: list[CutClip] = []
    piece: list[Frame] = []
    start_s, rate, count = 0.0, settings.fps, 0

    def close() -> None:
        if len(piece) >= settings.min_frames:
            clips.append(CutClip(np.stack(piece), float(rate or 0.0), start_s))
        piece.clear()

    for frame in resample(decode_frames(path), settings.fps):
        rate = rate or 1.0 / frame.duration_s
        if not piece:
            start_s = frame.time_s
        piece.append(_fit(frame.image, settings))
        if piece[-1].shape != piece[0].shape:
            raise DataError(f"{path} changes its size from {piece[0].shape[:2]} to {piece[-1].shape[:2]} in mid-video")
        count += 1
        if len(piece) == settings.max_frames:
            close()
    if piece:
        close()
    if not clips:
        raise DataError(f"{path} has {count} frames at the clips' rate, fewer than min_frames = {settings.min_frames}")
    return clips


def _fit(image: Frame, settings: CutSettings) -> Frame:
    """Resize and crop to the settings' size, or crop to the multiple."""
    multiple = settings.size_multiple
    height = settings.height or image.shape[0] // multiple * multiple
    width = settings.width or image.shape[1] // multiple * multiple
    if height == 0 or width == 0:
        raise DataError(f"frames of {image.shape[0]} x {image.shape[1]} px are smaller than the codec's {multiple} px")
    if settings.height or settings.width:
        return cover_and_crop(image, height, width)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
