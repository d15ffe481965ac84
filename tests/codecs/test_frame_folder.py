import numpy as np
import pytest
from PIL import Image

from flowception.codecs.frame_folder import frame_paths, read_frame, read_frame_size
from flowception.codecs.video_file import decode_frames, read_header
from flowception.errors import DataError


def write_frame(path, level=0, *, height=6, width=8, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), (level,) * len(mode) if mode.startswith("RGB") else level).save(path)


def test_frames_are_in_natural_order_and_other_files_are_ignored(tmp_path):
    names = ["f1.png", "f02.png", "f2.png", "f9.JPG", "f10.jpeg", "f10b.png"]
    for name in (*reversed(names), "notes.txt", "._f1.png", "f3.gif"):
        (tmp_path / name).touch()
    assert [path.name for path in frame_paths(tmp_path)] == names


def test_times_begin_at_a_frame_at_or_before_the_start(tmp_path):
    for number in range(12):
        write_frame(tmp_path / f"{number}.png", 20 * number)
    for start_s, first in ((0.0, 0), (0.5, 4), (0.6, 4), (1.25, 10), (9.0, 12)):
        frames = list(decode_frames(tmp_path, start_s, frame_folder_fps=8.0))
        assert [frame.time_s for frame in frames] == [number / 8 for number in range(first, 12)]
        assert [int(frame.image.max()) for frame in frames] == [20 * number for number in range(first, 12)]
        assert {frame.duration_s for frame in frames} <= {1 / 8}


def test_gray_and_transparent_frames_become_rgb(tmp_path):
    write_frame(tmp_path / "gray.png", 7, mode="L")
    write_frame(tmp_path / "clear.png", 9, mode="RGBA")
    for name, level in (("gray", 7), ("clear", 9)):
        assert np.array_equal(read_frame(tmp_path / f"{name}.png"), np.full((6, 8, 3), level, np.uint8))


def test_a_header_counts_frames_and_decodes_none(tmp_path):
    for number in range(3):
        write_frame(tmp_path / f"{number}.png")
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(content[:45])
    with pytest.raises(DataError, match="0.png cannot be read"):
        read_frame(tmp_path / "0.png")
    header = read_header(tmp_path, frame_folder_fps=2.0)
    assert (header.height, header.width, header.fps, header.duration_s) == (6, 8, 2.0, 1.5)


def test_errors_name_the_file_and_the_problem(tmp_path):
    def decode(fps=8.0):
        return list(decode_frames(tmp_path / "clip", frame_folder_fps=fps))

    (tmp_path / "clip").mkdir()
    with pytest.raises(DataError, match="clip contains no frames; put .jpeg .jpg .png files in it"):
        decode()
    write_frame(tmp_path / "clip" / "0.png")
    for broken in (decode, lambda fps: read_header(tmp_path / "clip", fps)):
        with pytest.raises(DataError, match="clip is a folder of frames and .*set frame_folder_fps"):
            broken(None)
    write_frame(tmp_path / "clip" / "1.png", height=8)
    with pytest.raises(DataError, match=r"same size, got \(8, 8\) px for .*1.png and \(6, 8\) before it"):
        decode()
    whole = (tmp_path / "clip" / "0.png").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2], whole[:-20] + bytes(20)):
        (tmp_path / "clip" / "1.png").write_bytes(content)
        with pytest.raises(DataError, match=r"frame .*1.png cannot be read \(\w+: "):
            decode()
    write_frame(tmp_path / "clip" / "1.png", 700, mode="I;16")
    with pytest.raises(DataError, match="1.png must have 8 bits per channel, got mode I;16; convert it"):
        decode()
    (tmp_path / "clip" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="0.png cannot be read"):
        read_frame_size(tmp_path / "clip" / "0.png")
