import pytest

from data_prep.video import CutSettings, cut_video
from flowception.errors import DataError


def test_frames_are_counted_by_decoding(tmp_path, write_counting_video, frame_numbers):
    path = write_counting_video(tmp_path / "a.mp4", 7)
    (clip,) = cut_video(path, CutSettings())
    assert frame_numbers(clip.frames) == list(range(7))
    assert (clip.fps, clip.start_s) == (10.0, 0.0)


def test_cut_into_pieces_and_a_short_rest_is_dropped(tmp_path, write_counting_video, frame_numbers):
    path = write_counting_video(tmp_path / "a.mp4", 11)
    pieces = cut_video(path, CutSettings(max_frames=4, min_frames=3))
    assert [frame_numbers(p.frames) for p in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [p.start_s for p in pieces] == pytest.approx([0.0, 0.4, 0.8])
    assert len(cut_video(path, CutSettings(max_frames=4, min_frames=4))) == 2


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (10.0, [0, 1, 2, 3, 4, 5]),
        (5.0, [0, 2, 4]),
        (20.0, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (4.0, [0, 2, 5]),  # ticks 0, 0.25, 0.5: on screen are frames 0, 2, 5
    ],
)
def test_resampling_shows_what_is_on_screen(tmp_path, write_counting_video, frame_numbers, fps, expected):
    path = write_counting_video(tmp_path / "a.mp4", 6)
    (clip,) = cut_video(path, CutSettings(fps=fps))
    assert frame_numbers(clip.frames) == expected
    assert clip.fps == fps


def test_sizes(tmp_path, write_counting_video):
    path = write_counting_video(tmp_path / "a.mp4", 2, height=36, width=50)
    shape = {multiple: cut_video(path, CutSettings(size_multiple=multiple))[0].frames.shape for multiple in (1, 4, 32)}
    assert shape == {1: (2, 36, 50, 3), 4: (2, 36, 48, 3), 32: (2, 32, 32, 3)}
    assert cut_video(path, CutSettings(height=16, width=64))[0].frames.shape == (2, 16, 64, 3)
    with pytest.raises(DataError, match="smaller than the codec's 64 px"):
        cut_video(path, CutSettings(size_multiple=64))


def test_too_short_is_said(tmp_path, write_counting_video):
    path = write_counting_video(tmp_path / "a.mp4", 3)
    with pytest.raises(DataError, match="has 3 frames at the clips' rate, fewer than min_frames = 5"):
        cut_video(path, CutSettings(min_frames=5))
