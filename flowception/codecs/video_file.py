"""Reading and writing video files with PyAV (its wheel brings FFmpeg).

A file's own claims about its length are never believed: frames are counted by decoding them. A frame is on screen
from its time until the next one's, so resampling to another rate takes, at every tick, the frame that is shown then.
A folder of images is read like a file, at a rate that the caller must know.

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
    """A decoded frame and when it is shown."""

    time_s: float
    """Seconds since the first frame."""
    duration_s: float
    """Seconds on screen by the stream's frame rate; the next frame's time is the better answer where there is one."""
    image: Frame
    """uint8 [H, W, 3], turned upright."""


@dataclass(frozen=True)
class VideoHeader:
    """What a file says of itself: good enough to choose files by, never believed in decoding."""

    height: int
    width: int
    fps: float
    duration_s: float
    """0 if the file does not say."""


def read_header(path: str | Path, frame_folder_fps: float | None = None) -> VideoHeader:
    """Read a video's header without decoding a frame.

    Args:
        path: Video file, or folder of frames.
        frame_folder_fps: Frames per second of a folder.

    Raises:
        DataError: If the file cannot be opened or has no video.
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
    """Decode a video's frames in the order in which they are shown.

    Args:
        path: Video file, or folder of frames (``frame_folder``).
        start_s: Seconds from the first frame; decoding may begin at any frame up to this time, which saves decoding
            what nobody wants.
        frame_folder_fps: Frames per second of a folder; a file has its own.

    Yields:
        Every frame that decodes, from the beginning or a key frame at or before ``start_s``.

    Raises:
        DataError: If the file cannot be opened, has no video, or stops decoding; if a folder has no frames, no rate, or
            frames of several sizes. The reason is in the message.
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
    """The frames of a folder and their rate."""
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
    """Go to the last key frame up to a time; time of the video's first frame, None if that is still to be seen."""
    if start_s <= 0 or stream.start_time is None:
        return None
    container.seek(stream.start_time + int(start_s / stream.time_base), stream=stream, backward=True)
    return float(stream.start_time * stream.time_base)


def _upright(frame: Any) -> Frame:
    """RGB of a frame, turned by the rotation that the file asks for."""
    image: Frame = frame.to_ndarray(format="rgb24")
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


def resample(frames: Iterable[TimedFrame], fps: float | None) -> Iterator[TimedFrame]:
    """Frames at the ticks ``0, 1 / fps, 2 / fps, ...``: at each the frame that is on screen.

    Args:
        frames: Decoded frames, in order of time.
        fps: Ticks per second; None passes every frame on.

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
    """All frames of a video as uint8 [n, H, W, 3].

    Raises:
        DataError: If it cannot be decoded or has no frames.
    """
    frames = [frame.image for frame in decode_frames(path)]
    if not frames:
        raise DataError(f"{path} has no frames; choose a video with at least one")
    return np.stack(frames)


def write_video(path: str | Path, video: Frame, *, fps: float, crf: int = 4, lossless_color: bool = True) -> None:
    """Write an H.264 mp4.

    One encoder thread and no time stamp of the writing, so that the same frames give the same bytes, but for about one
    of 1,000 files in which x264 decides otherwise by a few levels.

    Args:
        path: File to write; its folder must exist.
        video: uint8 [n, H, W, 3].
        fps: Frames per second.
        crf: H.264's quality, 0 (best) to 51.
        lossless_color: Keep color at full resolution (4:4:4). False is 4:2:0, which every player shows, and needs
            even height and width.

    Raises:
        DataError: If the frames are no video, or the file cannot be written.
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
    """Resize an image [H, W, 3] to exactly ``height x width``; nothing is cropped."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def cover_and_crop(image: Frame, height: int, width: int) -> Frame:
    """Resize an image until it covers ``height x width`` and keep the middle.

    An image that has that size already comes back as it is.

    Args:
        image: uint8 [H, W, 3].
        height: Pixels wanted.
        width: Pixels wanted.

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
