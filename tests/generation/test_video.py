"""Clips are read back as written, up to the loss of H.264."""

import numpy as np
import pytest
from PIL import Image

from flowception.codecs.video_file import read_video
from flowception.errors import DataError
from flowception.generation.context import cover_and_crop
from flowception.generation.video import (
    enlarge,
    pad_to_even,
    read_first_frame,
    write_contact_sheet,
    write_mp4,
    write_preview,
)

COLORS = np.array([[230, 30, 30], [30, 200, 60], [40, 80, 240], [240, 200, 20]], dtype=np.uint8)


def moving_disc(frames, side, color):
    """A disc on black that moves one pixel per frame."""
    rows, columns = np.mgrid[:side, :side]
    inside = [(rows - side / 2) ** 2 + (columns - side / 4 - t) ** 2 < (side / 5) ** 2 for t in range(frames)]
    return np.where(np.stack(inside)[..., None], color, np.uint8(10)).astype(np.uint8)


@pytest.mark.parametrize("color", COLORS.tolist())
def test_a_tiny_mp4_keeps_its_colors_and_edges(tmp_path, color):
    video = moving_disc(7, 16, np.array(color, dtype=np.uint8))
    write_mp4(tmp_path / "clip.mp4", video, fps=8)
    back = read_video(tmp_path / "clip.mp4")
    assert back.shape == video.shape
    assert np.abs(back.astype(int) - video).max() <= 16
    assert np.abs(back.astype(int) - video).mean() <= 2.5


def test_a_large_mp4_of_odd_size_plays_everywhere(tmp_path):
    import av

    video = np.tile(COLORS[0], (3, 131, 133, 1))
    write_mp4(tmp_path / "clip.mp4", video, fps=16)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.format.name) == ("h264", "yuv420p")
        assert (stream.height, stream.width, stream.average_rate) == (132, 134, 16)
    assert np.abs(read_video(tmp_path / "clip.mp4")[:, :131, :133].astype(int) - video).max() <= 8


def test_pad_to_even_repeats_the_edge():
    video = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(1, 3, 5, 3)
    padded = pad_to_even(video)
    assert padded.shape == (1, 4, 6, 3)
    assert np.array_equal(padded[:, :3, :5], video)
    assert np.array_equal(padded[0, 3, :5], video[0, 2])


def test_the_preview_has_every_frame_enlarged_by_an_integer_factor(tmp_path):
    video = moving_disc(5, 16, COLORS[2])
    write_preview(tmp_path / "clip.gif", video, fps=8)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.size) == (5, (160, 160))
        for number in range(5):
            image.seek(number)
            shown = np.asarray(image.convert("RGB"))
            assert np.abs(shown[::10, ::10].astype(int) - video[number]).max() <= 8
            assert np.array_equal(shown, enlarge(shown[::10, ::10], 160))


def test_the_contact_sheet_has_a_row_for_each_clip(tmp_path):
    videos = [np.tile(color, (n, 16, 16, 1)) for color, n in zip(COLORS, (2, 40, 1, 3))]
    write_contact_sheet(tmp_path / "contact.png", videos, ["a", "b", "c", "d"])
    sheet = np.asarray(Image.open(tmp_path / "contact.png"))
    for row, (color, frames) in enumerate(zip(COLORS, (2, 16, 1, 3))):
        band = sheet[4 + row * 68 : 4 + row * 68 + 64]
        assert np.all(band == color, axis=-1).sum() == frames * 64 * 64


@pytest.mark.parametrize("shape", [(16, 16, 3), (2, 16, 16, 4), (0, 16, 16, 3)])
def test_an_array_that_is_not_a_video_is_refused(tmp_path, shape):
    with pytest.raises(DataError, match="a video must be uint8"):
        write_mp4(tmp_path / "clip.mp4", np.zeros(shape, dtype=np.uint8), fps=8)


def test_the_first_frame_of_an_image_and_of_a_video(tmp_path):
    video = moving_disc(4, 32, COLORS[1])
    Image.fromarray(video[2]).save(tmp_path / "image.png")
    assert np.array_equal(read_first_frame(tmp_path / "image.png"), video[2])
    write_mp4(tmp_path / "video.mp4", video, fps=8)
    assert np.abs(read_first_frame(tmp_path / "video.mp4").astype(int) - video[0]).max() <= 16


def test_a_file_that_is_neither_image_nor_video_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"notes\.txt"):
        read_first_frame(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="does not exist"):
        read_first_frame(tmp_path / "missing.png")


def test_cover_and_crop_keeps_the_middle_and_the_proportions():
    image = np.zeros((20, 60, 3), dtype=np.uint8)
    image[:, 20:40] = 255
    assert np.all(cover_and_crop(image, 20, 20) == 255)
    cropped = cover_and_crop(image, 10, 20)
    assert cropped.shape == (10, 20, 3)
    assert cropped[:, :4].max() < 40
    assert cropped[:, 7:13].min() > 215


def test_an_image_of_the_correct_size_is_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert np.array_equal(cover_and_crop(image, 16, 24), image)
