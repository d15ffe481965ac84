"""Reads and writes video files with PyAV (whose wheel includes FFmpeg).

A file's declared length is never trusted: frames are counted by decoding them. A frame is on screen from its time until
the next frame's, so resampling to another rate picks, at every tick, the frame on screen. A folder of images is read
like a file, at a rate given by the caller.

Shape legend: frames are uint8 ``[H, W, 3]`` RGB arrays, a video ``[n, H, W, 3]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowception.codecs.frame_folder import frame_paths, read_frame, read_frame_size
from flowception.errors import DataError

Frame = NDArray[np.uint8]
_TICK_TOLERANCE_S = 1e-4


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame and its display time."""

    time_s: float
    """Seconds since the first frame."""
    duration_s: float
    """Seconds on screen by the stream's frame rate; the next frame's time is more accurate, if there is one."""
    image: Frame
    """uint8 [H, W, 3], rotated upright."""


@dataclass(frozen=True)
class VideoHeader:
    """A file's declared properties: good enough for filtering files, never trusted when decoding."""

    height: int
    width: int
    fps: float
    duration_s: float
    """0 if the file does not declare it."""


def read_header(path: str | Path, frame_folder_fps: float | None = None) -> VideoHeader:
    """Read a video's header without decoding a frame.

    Args:
        path: Video file, or folder of frames.
        frame_folder_fps: Frames per second of a folder.

    Raises:
        DataError: If the file cannot be opened or has no video stream.
    """
    if Path(path).is_dir():
        frames, fps = _open_folder(Path(path), frame_folder_fps)
        return VideoHeader(*read_frame_size(frames[0]), fps, len(frames) / fps)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} has no video stream; choose a video file")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            duration_s = float(stream.duration * stream.time_base) if stream.duration else 0.0
            duration_s = duration_s or float(container.duration or 0) / av.time_base
            return VideoHeader(stream.height, stream.width, fps, duration_s)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be opened ({type(error).__name__}: {error}); replace the file") from error


def decode_frames(
    path: str | Path, start_s: float = 0.0, frame_folder_fps: float | None = None
) -> Iterator[TimedFrame]:
    """Decode a video's frames in display order.

    Args:
        path: Video file, or folder of frames (``frame_folder``).
        start_s: Seconds from the first frame. Decoding may start at any frame up to this time, to skip unneeded frames.
        frame_folder_fps: Frames per second of a folder; ignored for files.

    Yields:
        Every frame that decodes, starting at the first frame or at a key frame at or before ``start_s``.

    Raises:
        DataError: If a file cannot be opened, has no video stream, or stops decoding, or if a folder has no frames, no
            rate, or frames of different sizes. The message has the reason.
    """
    if Path(path).is_dir():
        yield from _decode_folder(Path(path), start_s, frame_folder_fps)
        return
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} has no video stream; choose a video file")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            first = _seek(container, stream, start_s)
            for number, frame in enumerate(container.decode(stream)):
                shown = frame.time if frame.time is not None else number / float(rate)
                first = shown if first is None else first
                yield TimedFrame(shown - first, 1.0 / float(rate), _upright(frame))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be decoded ({type(error).__name__}: {error}); replace the file") from error


def _open_folder(folder: Path, fps: float | None) -> tuple[list[Path], float]:
    """Frame paths of a folder and the frame rate."""
    frames = frame_paths(folder)
    if fps is None:
        raise DataError(no_rate(folder))
    return frames, fps


def no_rate(folder: Path) -> str:
    """The message for a folder of frames without a configured rate."""
    return f"{folder} is a folder of frames and has no frame rate; set frame_folder_fps"


def _decode_folder(folder: Path, start_s: float, fps: float | None) -> Iterator[TimedFrame]:
    paths, fps = _open_folder(folder, fps)
    size: tuple[int, ...] | None = None
    for number in range(max(0, int(start_s * fps)), len(paths)):
        image = read_frame(paths[number])
        size = size or image.shape[:2]
        if image.shape[:2] != size:
            raise DataError(
                f"all frames of a folder must have the same size, got {image.shape[:2]} px for {paths[number]} and "
                f"{size} before it; resize them"
            )
        yield TimedFrame(number / fps, 1.0 / fps, image)


def _seek(container: Any, stream: Any, start_s: float) -> float | None:
    """Seek to the last key frame up to a time. Returns the time of the first frame, or None if not yet known."""
    if start_s <= 0 or stream.start_time is None:
        return None
    container.seek(stream.start_time + int(start_s / stream.time_base), stream=stream, backward=True)
    return float(stream.start_time * stream.time_base)


def _upright(frame: Any) -> Frame:
    """A frame in RGB, rotated as the file specifies."""
    image: Frame = frame.to_ndarray(format="rgb24")
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


def resample(frames: Iterable[TimedFrame], fps: float | None) -> Iterator[TimedFrame]:
    """The frame on screen at each tick ``0, 1 / fps, 2 / fps, ...``.

    Args:
        frames: Decoded frames, in order of time.
        fps: Ticks per second; None yields every frame unchanged.

    Yields:
        A frame for each tick until the last frame leaves the screen.
    """
    if fps is None:
        yield from frames
        return
    tick, shown = 0, None

    def until(end_s: float) -> Iterator[TimedFrame]:
        nonlocal tick
        while shown is not None and tick / fps < end_s - _TICK_TOLERANCE_S:
            yield TimedFrame(tick / fps, 1.0 / fps, shown.image)
            tick += 1

    for frame in frames:
        yield from until(frame.time_s)
        shown = frame
    if shown is not None:
        yield from until(shown.time_s + shown.duration_s)


def read_video(path: str | Path) -> Frame:
    """Read all frames of a video, uint8 [n, H, W, 3].

    Raises:
        DataError: If it cannot be decoded or has no frames.
    """
    frames = [frame.image for frame in decode_frames(path)]
    if not frames:
        raise DataError(f"{path} has no frames; choose a video with at least one")
    return np.stack(frames)


def write_video(path: str | Path, video: Frame, *, fps: float, crf: int = 4, lossless_color: bool = True) -> None:
    """Write an H.264 mp4.

    Uses one encoder thread and writes no timestamp, so the same frames produce the same bytes, except for about one in
    1,000 files, where x264's output differs by a few levels.

    Args:
        path: File to write; its folder must exist.
        video: uint8 [n, H, W, 3].
        fps: Frames per second.
        crf: H.264 constant rate factor, 0 (best) to 51.
        lossless_color: Keep color at full resolution (4:4:4). False uses 4:2:0, which every player supports, and needs
            even height and width.

    Raises:
        DataError: If ``video`` has the wrong dtype or shape, or the file cannot be written.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or len(video) == 0:
        raise DataError(f"video must be uint8 [frames, height, width, 3], frames >= 1, got {video.dtype} {video.shape}")
    try:
        _write_h264(path, video, fps, {"crf": str(crf), "threads": "1", "flags": "+bitexact"}, lossless_color)
    except av.FFmpegError as error:
        raise DataError(f"{path} cannot be written ({error}); choose a writable folder") from error


def _write_h264(path: str | Path, video: Frame, fps: float, options: dict[str, str], lossless_color: bool) -> None:
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv444p" if lossless_color else "yuv420p"
        stream.options = options
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def stretch(image: Frame, height: int, width: int) -> Frame:
    """Resize an image [H, W, 3] to exactly ``height x width``, without cropping."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def cover_and_crop(image: Frame, height: int, width: int) -> Frame:
    """Resize an image to cover ``height x width``, then crop the center.

    An image that already has this size is returned unchanged.

    Args:
        image: uint8 [H, W, 3].
        height: Target height in pixels.
        width: Target width in pixels.

    Returns:
        uint8 [height, width, 3].
    """
    if image.shape[:2] == (height, width):
        return image
    scale = max(height / image.shape[0], width / image.shape[1])
    half_height, half_width = height / scale / 2, width / scale / 2
    middle_y, middle_x = image.shape[0] / 2, image.shape[1] / 2
    box = (middle_x - half_width, middle_y - half_height, middle_x + half_width, middle_y + half_height)
    limits = (image.shape[1], image.shape[0]) * 2
    box = tuple(min(max(edge, 0.0), float(limit)) for edge, limit in zip(box, limits, strict=True))
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=box))
