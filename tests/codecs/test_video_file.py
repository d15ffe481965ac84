import numpy as np
import pytest

from flowception.codecs.video_file import TimedFrame, cover_and_crop, decode_frames, read_video, resample, write_video
from flowception.errors import DataError


def moving_square(frames: int, size: int = 16) -> np.ndarray:
    video = np.full((frames, size, size, 3), 24, np.uint8)
    for k in range(frames):
        video[k, 4:9, k % (size - 5) : k % (size - 5) + 5] = (255, 40, 40)
    return video


@pytest.mark.parametrize("frames", [1, 2, 10])
def test_h264_keeps_frames_and_colors(tmp_path, frames):
    video = moving_square(frames)
    write_video(tmp_path / "a.mp4", video, fps=8)
    found = read_video(tmp_path / "a.mp4")
    assert found.shape == video.shape
    assert np.abs(found.astype(int) - video).max() <= 10
    times = [frame.time_s for frame in decode_frames(tmp_path / "a.mp4")]
    np.testing.assert_allclose(times, np.arange(frames) / 8)


def test_the_bytes_repeat(tmp_path):
    """Of four files at least three are alike: x264 is not quite a function (see ``write_video``)."""
    contents = []
    for number in range(4):
        write_video(tmp_path / f"{number}.mp4", moving_square(5), fps=8)
        contents.append((tmp_path / f"{number}.mp4").read_bytes())
    assert max(map(contents.count, contents)) >= 3


def test_a_non_video_is_rejected(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "whole.mp4", moving_square(8), fps=8)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    for name in ("text.mp4", "empty.mp4", "cut.mp4", "missing.mp4"):
        with pytest.raises(DataError, match=name):
            read_video(tmp_path / name)
    with pytest.raises(DataError, match="uint8"):
        write_video(tmp_path / "a.mp4", np.zeros((0, 16, 16, 3), np.uint8), fps=8)


def test_cover_and_crop_keeps_the_middle():
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, 15:25] = 200  # the middle square
    assert (cover_and_crop(image, 10, 10) == 200).all()
    assert cover_and_crop(image, 20, 20).shape == (20, 20, 3)
    assert cover_and_crop(image.transpose(1, 0, 2), 10, 10).min() == 200
    assert cover_and_crop(image, 10, 40) is image


def test_resampling_of_uneven_times():
    image = np.zeros((1, 1, 3), np.uint8)
    times = [0.0, 0.1, 0.9, 1.0]
    frames = [TimedFrame(t, 0.1, image + k) for k, t in enumerate(times)]
    assert [int(f.image[0, 0, 0]) for f in resample(frames, 5.0)] == [0, 1, 1, 1, 1, 3]
    assert list(resample([], 5.0)) == []
