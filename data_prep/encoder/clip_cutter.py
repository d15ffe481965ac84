"""Cutting a video (a file or a folder of frames) into clips of a given frame rate, size, and length.

Frames are counted as they are decoded. The length in a file's header is never used.

Shape legend: frames are uint8 ``[H, W, 3]``, a clip ``[n, H, W, 3]``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.encoder.resolution import fitted_size
from flowception.codecs.video_file import Frame, TimedFrame, cover_and_crop, decode_frames, resample, stretch
from flowception.errors import DataError

DROP_REASONS = ("min_frames", "min_motion")
"""Settings that can drop some pieces of a video and keep others."""
_TIME_TOLERANCE_S = 1e-4


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """How to cut videos into clips."""

    fps: float | None = None
    """Frames per second of the clips; None keeps every frame."""
    height: int | None = None
    """Pixels; None keeps the video's height, rounded down to a multiple of ``size_multiple``."""
    width: int | None = None
    """Pixels; None keeps the video's width, rounded down to a multiple of ``size_multiple``."""
    size_multiple: int = 1
    """Height and width of a clip are multiples of this."""
    min_frames: int = 1
    """A video's last piece is dropped if it has fewer frames."""
    max_frames: int | None = None
    """Frames per piece; None does not cut videos."""
    max_pixels: int | None = None
    """Largest height x width; videos are resized to the nearest shape that fits, without cropping. None is off."""
    min_motion: float | None = None
    """Pieces with less ``motion`` than this are dropped. None is off."""
    max_video_bytes: float = math.inf
    """A video whose decoded clips take more memory than this is refused."""
    start_s: float = 0.0
    """Seconds from the video's first frame. The clip starts with the frame on screen at this time."""
    end_s: float | None = None
    """Frames at or after this time are skipped; None is the video's end."""
    frame_folder_fps: float | None = None
    """Frames per second, if the video is a folder of frames."""


@dataclass(frozen=True)
class CutClip:
    """A piece of a video."""

    frames: Frame
    """uint8 [n, H, W, 3]."""
    fps: float
    start_s: float
    """Seconds from the video's first frame."""


@dataclass(frozen=True)
class CutVideo:
    """The clips of a video."""

    clips: list[CutClip]
    """At least one, in order."""
    dropped: Counter[str]
    """Number of dropped pieces by the setting that dropped them, one of ``DROP_REASONS``."""


def cut_video(path: Path, settings: CutSettings) -> CutVideo:
    """Decode a video and cut it into clips.

    Args:
        path: Video file, or folder of frames.
        settings: How to cut.

    Returns:
        Its clips, and the number of dropped pieces.

    Raises:
        DataError: If the video cannot be decoded, changes its size, needs too much memory, is too short, or moves too
            little. The message is the reason to record.
    """
    clips, dropped = list[CutClip](), Counter[str]()
    piece: list[Frame] = []
    start_s, rate, count, held_bytes = 0.0, settings.fps, 0, 0

    def close() -> None:
        if len(piece) >= settings.min_frames:
            clips.append(CutClip(np.stack(piece), float(rate or 0.0), start_s))
        else:
            dropped["min_frames"] += 1
        piece.clear()

    part = select_part(
        decode_frames(path, settings.start_s, settings.frame_folder_fps), settings.start_s, settings.end_s
    )
    for frame in resample(part, settings.fps):
        rate = rate or 1.0 / frame.duration_s
        if not piece:
            start_s = settings.start_s + frame.time_s
        piece.append(_fit(frame.image, settings))
        if piece[-1].shape != piece[0].shape:
            raise DataError(f"{path} changes its frame size from {piece[0].shape[:2]} to {piece[-1].shape[:2]}")
        count += 1
        held_bytes += piece[-1].nbytes
        if held_bytes > settings.max_video_bytes:
            raise DataError(
                f"{path} needs more than max_video_gib={settings.max_video_bytes / 2**30:g} GiB when decoded, reached "
                f"at {start_s:.0f} s; split it with columns start_s and end_s, or raise max_video_gib"
            )
        if len(piece) == settings.max_frames:
            close()
    if piece:
        close()
    if not clips:
        raise DataError(f"{path} has {count} frames at the clip fps, fewer than min_frames={settings.min_frames}")
    moving = _moving(path, clips, settings.min_motion)
    dropped["min_motion"] = len(clips) - len(moving)
    return CutVideo(moving, +dropped)


def _moving(path: Path, clips: list[CutClip], min_motion: float | None) -> list[CutClip]:
    """The clips with at least ``min_motion``."""
    if min_motion is None:
        return clips
    found = [motion(clip.frames) for clip in clips]
    if max(found) < min_motion:
        raise DataError(f"{path} has motion {max(found):.3g} at most, less than min_motion={min_motion:g}")
    return [clip for clip, moved in zip(clips, found) if moved >= min_motion]


def motion(frames: Iterable[Frame]) -> float:
    """Mean absolute change of a pixel from one frame to the next, 0 to 255.

    A cut between two scenes counts as motion too. A single frame has motion 0.
    """
    changes = [np.abs(after.astype(np.int16) - before).mean() for before, after in pairwise(frames)]
    return float(np.mean(changes)) if changes else 0.0


def select_part(frames: Iterable[TimedFrame], start_s: float, end_s: float | None) -> Iterator[TimedFrame]:
    """The frames on screen between two times, with times relative to ``start_s``.

    Args:
        frames: Decoded frames, in order of time.
        start_s: Seconds from the video's first frame.
        end_s: Seconds from the video's first frame; None is the video's end.

    Yields:
        The frame on screen at ``start_s``, then the frames before ``end_s``.
    """
    earlier: TimedFrame | None = None
    for frame in frames:
        time_s = frame.time_s - start_s
        left_s = None if end_s is None else end_s - frame.time_s
        if left_s is not None and left_s < _TIME_TOLERANCE_S:
            break
        if time_s < -_TIME_TOLERANCE_S:
            earlier = frame
            continue
        if earlier is not None and time_s > _TIME_TOLERANCE_S:
            yield TimedFrame(0.0, earlier.duration_s, earlier.image)
        earlier = None
        yield TimedFrame(max(0.0, time_s), min(frame.duration_s, left_s or frame.duration_s), frame.image)


def _fit(image: Frame, settings: CutSettings) -> Frame:
    """Resize and crop a frame to the configured size, or crop it to the multiple."""
    multiple = settings.size_multiple
    if settings.max_pixels is not None:
        return stretch(image, *fitted_size(image.shape[0], image.shape[1], multiple, settings.max_pixels))
    height = settings.height or image.shape[0] // multiple * multiple
    width = settings.width or image.shape[1] // multiple * multiple
    if height == 0 or width == 0:
        raise DataError(
            f"frames of {image.shape[0]} x {image.shape[1]} px are smaller than the codec's stride of {multiple} px"
        )
    if settings.height or settings.width:
        return cover_and_crop(image, height, width)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
