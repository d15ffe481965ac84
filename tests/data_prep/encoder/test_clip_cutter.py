import numpy as np
import pytest
from PIL import Image

from data_prep.encoder.clip_cutter import CutSettings, cut_video, motion, select_part
from flowception.codecs.video_file import decode_frames, write_video
from flowception.errors import DataError


def test_frames_are_counted_by_decoding(tmp_path, write_counting_video, frame_numbers):
    path = write_counting_video(tmp_path / "a.mp4", 7)
    (clip,) = cut_video(path, CutSettings()).clips
    assert frame_numbers(clip.frames) == list(range(7))
    assert (clip.fps, clip.start_s) == (10.0, 0.0)


def test_videos_are_cut_into_pieces_and_a_short_remainder_is_dropped(tmp_path, write_counting_video, frame_numbers):
    path = write_counting_video(tmp_path / "a.mp4", 11)
    pieces = cut_video(path, CutSettings(max_frames=4, min_frames=3)).clips
    assert [frame_numbers(p.frames) for p in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [p.start_s for p in pieces] == pytest.approx([0.0, 0.4, 0.8])
    assert cut_video(path, CutSettings(max_frames=4, min_frames=3)).dropped == {}
    cut = cut_video(path, CutSettings(max_frames=4, min_frames=4))
    assert (len(cut.clips), cut.dropped) == (2, {"min_frames": 1})


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (10.0, [0, 1, 2, 3, 4, 5]),
        (5.0, [0, 2, 4]),
        (20.0, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (4.0, [0, 2, 5]),  # at 0, 0.25, 0.5 s, frames 0, 2, 5 are on screen
    ],
)
def test_resampling_picks_the_frames_on_screen(tmp_path, write_counting_video, frame_numbers, fps, expected):
    path = write_counting_video(tmp_path / "a.mp4", 6)
    (clip,) = cut_video(path, CutSettings(fps=fps)).clips
    assert frame_numbers(clip.frames) == expected
    assert clip.fps == fps


def test_sizes(tmp_path, write_counting_video):
    path = write_counting_video(tmp_path / "a.mp4", 2, height=36, width=50)
    shape = {
        multiple: cut_video(path, CutSettings(size_multiple=multiple)).clips[0].frames.shape for multiple in (1, 4, 32)
    }
    assert shape == {1: (2, 36, 50, 3), 4: (2, 36, 48, 3), 32: (2, 32, 32, 3)}
    assert cut_video(path, CutSettings(height=16, width=64)).clips[0].frames.shape == (2, 16, 64, 3)
    with pytest.raises(DataError, match="smaller than the codec's stride of 64 px"):
        cut_video(path, CutSettings(size_multiple=64))


def test_a_too_short_video_is_refused(tmp_path, write_counting_video):
    path = write_counting_video(tmp_path / "a.mp4", 3)
    with pytest.raises(DataError, match="has 3 frames at the clip fps, fewer than min_frames=5"):
        cut_video(path, CutSettings(min_frames=5))


def test_parts_of_a_video(tmp_path, write_counting_video, frame_numbers):
    """Ten frames per second: frame k is on screen from k / 10 s on."""
    path = write_counting_video(tmp_path / "a.mp4", 25)

    def shown(**settings):
        (clip,) = cut_video(path, CutSettings(**settings)).clips
        return frame_numbers(clip.frames)

    assert shown(start_s=1.0, end_s=1.5) == [10, 11, 12, 13, 14]
    assert shown(start_s=1.04, end_s=1.31) == [10, 11, 12, 13]
    assert shown(start_s=2.2) == [22, 23, 24]
    assert shown(start_s=1.0, end_s=2.0, fps=5.0) == [10, 12, 14, 16, 18]
    assert shown(start_s=1.05, end_s=1.45, fps=20.0) == [10, 11, 11, 12, 12, 13, 13, 14]
    first, second = cut_video(path, CutSettings(start_s=0.5, end_s=1.1, max_frames=3)).clips
    assert (first.start_s, second.start_s) == (pytest.approx(0.5), pytest.approx(0.8))
    with pytest.raises(DataError, match="has 0 frames"):
        cut_video(path, CutSettings(start_s=9.0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fps": 5.0},
        {"fps": 16.0, "start_s": 0.3, "end_s": 1.45},
        {"start_s": 0.75, "max_frames": 4, "min_frames": 3},
        {"height": 16, "width": 32, "min_motion": 1.0},
        {"max_pixels": 600, "size_multiple": 4},
    ],
)
def test_a_folder_of_frames_is_cut_like_an_equal_video(tmp_path, settings):
    frames = np.random.default_rng(4).integers(0, 256, (13, 20, 36, 3), dtype=np.uint8)
    write_lossless(tmp_path / "a.mkv", frames, fps=8)
    (tmp_path / "a").mkdir()
    for number, image in enumerate(frames):
        Image.fromarray(image).save(tmp_path / "a" / f"{number}.png")
    file = cut_video(tmp_path / "a.mkv", CutSettings(**settings))
    folder = cut_video(tmp_path / "a", CutSettings(frame_folder_fps=8.0, **settings))
    if not settings:
        assert np.array_equal(file.clips[0].frames, frames)
    assert (len(folder.clips), folder.dropped) == (len(file.clips), file.dropped)
    for ours, theirs in zip(folder.clips, file.clips, strict=True):
        assert np.array_equal(ours.frames, theirs.frames)
        assert (ours.fps, ours.start_s) == (pytest.approx(theirs.fps), pytest.approx(theirs.start_s))


def write_lossless(path, frames, fps):
    """FFV1 in RGB, which decodes to the same bytes."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_seeking_yields_the_same_frames_as_decoding_everything(tmp_path):
    """With a key frame every 12 frames and B-frames between, a seek must not be off by a frame."""
    import av

    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 16
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "4", "g": "12", "bf": "3"}
        for k in range(60):
            image = np.full((16, 16, 3), 16 + 3 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    everything = list(decode_frames(path))
    for start_s in (0.05, 0.7, 1.2, 1.25, 3.99, 5.85):
        sought = list(decode_frames(path, start_s))
        assert sought[0].time_s <= start_s + 1e-6
        wanted = list(select_part(everything, start_s, None))
        found = list(select_part(sought, start_s, None))
        assert [f.time_s for f in found] == pytest.approx([f.time_s for f in wanted])
        assert all(np.array_equal(f.image, w.image) for f, w in zip(found, wanted, strict=True))
    assert len(list(decode_frames(path, 3.0))) < 60 - 12


def test_a_video_of_any_shape_is_not_cropped(tmp_path):
    """An image with a bright left and top edge keeps both."""
    image = np.zeros((50, 90, 3), np.uint8)
    image[:, :8], image[:8, :] = 255, 255
    write_video(tmp_path / "wide.mp4", np.stack([image] * 2), fps=8)
    write_video(tmp_path / "tall.mp4", np.stack([image.transpose(1, 0, 2)] * 2), fps=8)
    for name, shape in (("wide", (24, 40)), ("tall", (40, 24))):
        (clip,) = cut_video(tmp_path / f"{name}.mp4", CutSettings(max_pixels=1024, size_multiple=8)).clips
        assert clip.frames.shape == (2, *shape, 3)
        assert clip.frames[:, :, 0].mean() > 200
        assert clip.frames[:, 0, :].mean() > 200
        assert clip.frames[:, -8:, -8:].mean() < 50


def test_a_video_too_large_for_the_memory_is_refused_with_advice(tmp_path, write_counting_video):
    path = write_counting_video(tmp_path / "a.mp4", 6)
    frame_bytes = cut_video(path, CutSettings()).clips[0].frames[0].nbytes
    assert len(cut_video(path, CutSettings(max_video_bytes=6 * frame_bytes)).clips[0].frames) == 6
    with pytest.raises(DataError, match="split it with columns start_s and end_s"):
        cut_video(path, CutSettings(max_video_bytes=5 * frame_bytes))


def test_motion_is_the_mean_change_from_frame_to_frame():
    frames = [np.full((4, 6, 3), value, dtype=np.uint8) for value in (200, 10, 10)]
    assert motion(frames) == 95.0  # one change by 190, then none
    assert motion(frames[:1]) == 0.0


def test_static_pieces_are_dropped(tmp_path):
    """Four frames that move, four that do not, four that move."""
    still, moving = [128] * 4, [40, 90, 140, 190]
    gray = np.array([*moving, *still, *moving], dtype=np.uint8)
    frames = np.broadcast_to(gray[:, None, None, None], (12, 32, 32, 3)).copy()
    write_video(tmp_path / "a.mp4", frames, fps=10)
    cut = cut_video(tmp_path / "a.mp4", CutSettings(max_frames=4, min_motion=10))
    assert [round(piece.start_s, 3) for piece in cut.clips] == [0.0, 0.8]
    assert cut.dropped == {"min_motion": 1}
    with pytest.raises(DataError, match=r"has motion (49|5\d)(\.\d+)? at most, less than min_motion=100"):
        cut_video(tmp_path / "a.mp4", CutSettings(max_frames=4, min_motion=100))
