"""Write clips as H.264 mp4, animated preview or contact sheet, and read the first frame of a context file.

Shape legend: ``n`` frames, ``H`` and ``W`` pixels. A video is uint8 ``[n, H, W, 3]``, RGB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flowception.codecs.video_file import decode_frames, write_video
from flowception.errors import DataError

Video = NDArray[np.uint8]

DEFAULT_FPS = 16.0
"""Frame rate of written files if neither the options nor the training clips set one."""

SMALL_SIDE_PIXELS = 128
"""Below this, chroma is stored at full resolution (yuv444p); halving it would smear the colors of a toy clip."""
PREVIEW_SIDE_PIXELS = 160
"""Frames of a preview are enlarged by an integer factor to about this side."""
LONGEST_PREVIEW_FRAME_MS = 655_350
"""The format counts hundredths of a second in 16 bits."""
CONTACT_SIDE_PIXELS = 64
CONTACT_FRAMES = 16
"""Maximum number of frames per clip on the contact sheet; longer clips are subsampled evenly."""


@contextmanager
def refused_writes(path: Path) -> Iterator[None]:
    """Raise ``DataError`` for a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); check its folder") from error


def _check_video(video: Video) -> None:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not video.shape[0]:
        raise DataError(f"a video must be uint8 [n, H, W, 3] with n >= 1, got {video.dtype} {list(video.shape)}")


def pad_to_even(video: Video) -> Video:
    """Repeat the last row or column if height or width is odd, because 4:2:0 needs even sizes."""
    _, height, width, _ = video.shape
    return np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def write_mp4(path: Path, video: Video, *, fps: float) -> None:
    """Write an H.264 file: small frames with full-resolution color, large ones in the format every player supports.

    Args:
        path: File to write.
        video: uint8 ``[n, H, W, 3]``.
        fps: Frames per second.
    """
    _check_video(video)
    small = min(video.shape[1:3]) < SMALL_SIDE_PIXELS
    write_video(path, video if small else pad_to_even(video), fps=fps, crf=4 if small else 14, lossless_color=small)


def read_first_frame(path: Path) -> NDArray[np.uint8]:
    """Read an image, or the first frame of a video, as uint8 ``[H, W, 3]``.

    Raises:
        DataError: If the file is missing, or is neither an image nor a video.
    """
    if not path.is_file():
        raise DataError(f"context file {path} does not exist; give an image or a video")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError:  # not an image: PIL's UnidentifiedImageError is one of these
        pass
    first = next(decode_frames(path), None)
    if first is None:
        raise DataError(f"context file {path} has no video frame; give an image or a video")
    return first.image


def enlarge(images: NDArray[np.uint8], side_pixels: int) -> NDArray[np.uint8]:
    """Enlarge images ``[..., H, W, 3]`` by the largest integer factor that keeps both sides within ``side_pixels``."""
    factor = max(1, side_pixels // max(images.shape[-3:-1]))
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_preview(path: Path, video: Video, *, fps: float) -> None:
    """Write an animated gif that loops forever, enlarged by an integer factor.

    Raises:
        DataError: If it cannot be written there.
    """
    _check_video(video)
    duration_ms = min(max(20, round(1000 / fps)), LONGEST_PREVIEW_FRAME_MS)
    images = [Image.fromarray(image) for image in enlarge(video, PREVIEW_SIDE_PIXELS)]
    with refused_writes(path):
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration_ms, loop=0)


def _thumbnail(image: NDArray[np.uint8]) -> Image.Image:
    enlarged = Image.fromarray(enlarge(image, CONTACT_SIDE_PIXELS))
    enlarged.thumbnail((2 * CONTACT_SIDE_PIXELS, 2 * CONTACT_SIDE_PIXELS))
    return enlarged


def write_contact_sheet(path: Path, videos: Sequence[Video], labels: Sequence[str]) -> None:
    """Write one image of all clips: a row per clip, its label, then its frames from left to right.

    Args:
        path: File to write.
        videos: Clips of any length.
        labels: Label of each clip.

    Raises:
        DataError: If it cannot be written there.
    """
    rows = []
    for video in videos:
        _check_video(video)
        shown = np.unique(np.linspace(0, len(video) - 1, min(len(video), CONTACT_FRAMES)).round().astype(int))
        rows.append([_thumbnail(video[i]) for i in shown])
    font = ImageFont.load_default(size=14)
    gap, label_width = 4, 16 + max((int(font.getlength(label)) for label in labels), default=0)
    cell_width = gap + max(image.width for row in rows for image in row)
    cell_height = gap + max(image.height for row in rows for image in row)
    size = (label_width + cell_width * max(map(len, rows)), gap + cell_height * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = gap + number * cell_height
        draw.text((8, top + (cell_height - gap) // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(row):
            sheet.paste(image, (label_width + column * cell_width, top))
    with refused_writes(path):
        sheet.save(path)
