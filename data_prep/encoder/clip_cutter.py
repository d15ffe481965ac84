"""Cuts a video, a file or a folder of frames, into clips: frame rate, size, length.

Frames are counted as they decode; what a file says of its own length is never used.

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
"""Settings that drop pieces of a video that gives others."""
_TIME_TOLERANCE_S = 1e-4


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
    max_pixels: int | None = None
    """Height x width at most; videos are resized to the nearest shape that fits, without cropping. None is off."""
    min_motion: float | None = None
    """Pieces with less ``motion`` than this are dropped. None is off."""
    max_video_bytes: float = math.inf
    """A video whose clips take more memory than this, decoded, is refused."""
    start_s: float = 0.0
    """Seconds from the video's first frame; the clip begins with the frame that is on screen then."""
    end_s: float | None = None
    """Frames at or after this time are left out; None is the video's end."""
    frame_folder_fps: float | None = None
    """Frames per second of a video that is a folder of frames."""


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
    """What a video was cut into."""

    clips: list[CutClip]
    """At least one, in order."""
    dropped: Counter[str]
    """Pieces left out by the setting that they fell short of, one of ``DROP_REASONS``."""


def cut_video(path: Path, settings: CutSettings) -> CutVideo:
    """Decode a video and cut it into clips.

    Args:
        path: Video file, or folder of frames.
        settings: How to cut.

    Returns:
        Its clips, and how many pieces were dropped.

    Raises:
        DataError: If the video cannot be decoded or is too short; the message is the reason to record.
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
    """The clips that move enough."""
    if min_motion is None:
        return clips
    found = [motion(clip.frames) for clip in clips]
    if max(found) < min_motion:
        raise DataError(f"{path} has motion {max(found):.3g} at most, less than min_motion={min_motion:g}")
    return [clip for clip, moved in zip(clips, found) if moved >= min_motion]


def motion(frames: Iterable[Frame]) -> float:
    """How much a piece moves: the mean absolute change of a pixel from one frame to the next, 0 to 255.

    A cut between two scenes counts as motion too. One frame has none.
    """
    changes = [np.abs(after.astype(np.int16) - before).mean() for before, after in pairwise(frames)]
    return float(np.mean(changes)) if changes else 0.0


def select_part(frames: Iterable[TimedFrame], start_s: float, end_s: float | None) -> Iterator[TimedFrame]:
    """The frames on screen between two times, timed from the first of these.

    Args:
        frames: Decoded frames, in order of time.
        start_s: Seconds from the video's first frame.
        end_s: Likewise; None is the end.

    Yields:
        The frame on screen at ``start_s`` and those that come before ``end_s``.
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
    """Resize and crop to the settings' size, or crop to the multiple."""
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
