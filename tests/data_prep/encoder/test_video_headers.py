import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from data_prep.encoder import video_headers as headers_module
from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.encoder import ShardEncoder
from data_prep.encoder.filters import FilterRange
from data_prep.encoder.manifest import read_source
from data_prep.encoder.video_headers import HEADERS_NAME, HeaderReader
from flowception.codecs.video_file import VideoHeader, read_header
from flowception.errors import ConfigError


@pytest.fixture
def opened(monkeypatch):
    """Names of the opened files, in order."""
    names = []

    def read(path, fps):
        names.append(path.name)
        return read_header(path, fps)

    monkeypatch.setattr(headers_module, "read_header", read)
    return names


@pytest.fixture
def videos(tmp_path, write_counting_video):
    """Four videos of 1, 2, 3, and 4 frames at 10 fps; the third is broken."""
    paths = [write_counting_video(tmp_path / f"{number}.mp4", number) for number in (1, 2, 3, 4)]
    paths[2].write_text("no video")
    return [(path, None) for path in paths]


def seconds(headers):
    return [None if header is None else round(header.duration_s, 3) for header in headers]


def test_all_tasks_together_open_each_file_once(videos, opened, tmp_path):
    readers = [HeaderReader(tmp_path / "set") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda reader: reader.read([*videos, videos[0]]), readers))
    assert [seconds(headers) for headers in found] == [[0.1, 0.2, None, 0.4, 0.1]] * 4
    assert found[0][3] == VideoHeader(16, 16, 10.0, found[0][3].duration_s)
    assert sorted(opened) == ["1.mp4", "2.mp4", "3.mp4", "4.mp4"]


def test_a_changed_file_is_opened_again(videos, opened, tmp_path, write_counting_video):
    folder = tmp_path / "set"
    assert seconds(HeaderReader(folder).read(videos[:3])) == [0.1, 0.2, None]
    opened.clear()
    write_counting_video(tmp_path / "2.mp4", 7)
    found = os.stat(tmp_path / "1.mp4")
    os.utime(tmp_path / "1.mp4", ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert seconds(HeaderReader(folder).read(videos)) == [0.1, 0.7, None, 0.4]
    assert sorted(opened) == ["1.mp4", "2.mp4", "4.mp4"]
    opened.clear()
    write_counting_video(tmp_path / "3.mp4", 3)
    assert seconds(HeaderReader(folder).read(videos)) == [0.1, 0.7, 0.3, 0.4]
    assert opened == ["3.mp4"]


def test_a_missing_file_is_read_once_it_exists(opened, tmp_path, write_counting_video):
    videos = [(tmp_path / "5.mp4", None)]
    assert HeaderReader(tmp_path / "set").read(videos) == [None]
    write_counting_video(tmp_path / "5.mp4", 5)
    for _ in range(2):
        assert seconds(HeaderReader(tmp_path / "set").read(videos)) == [0.5]
    assert opened == ["5.mp4", "5.mp4"]


def test_the_frame_rate_of_a_folder_of_frames_is_part_of_its_identity(tmp_path, opened):
    from PIL import Image

    (tmp_path / "clip").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 4)).save(tmp_path / "clip" / f"{number}.png")
    rates = [(tmp_path / "clip", 2.0), (tmp_path / "clip", 3.0)]
    for _ in range(2):
        assert HeaderReader(tmp_path / "set").read(rates) == [VideoHeader(4, 8, 2.0, 3.0), VideoHeader(4, 8, 3.0, 2.0)]
    assert len(opened) == 2


@pytest.mark.parametrize("content", [b"{", b'["a"]\n', b"\xff\n", b"3\n"])
def test_a_damaged_list_is_rewritten(videos, tmp_path, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / HEADERS_NAME).write_bytes(content)
    assert seconds(HeaderReader(tmp_path / "set").read(videos)) == [0.1, 0.2, None, 0.4]
    lines = [json.loads(line) for line in (tmp_path / "set" / HEADERS_NAME).read_text().splitlines()]
    assert [line[0] for line in lines] == [str(path) for path, _ in videos]


def test_a_folder_that_cannot_be_written_is_named(videos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/.headers.jsonl.lock cannot be created or locked"):
        HeaderReader(tmp_path / "file").read(videos)


def test_several_filters_open_each_file_once(videos, opened, tmp_path):
    filters = {"duration_s": FilterRange(min=0.2), "height": FilterRange(min=16), "fps": FilterRange(max=10)}
    assert [e.source for e in read_source(tmp_path, filters=filters).entries] == ["2.mp4", "4.mp4"]
    assert sorted(opened) == ["1.mp4", "2.mp4", "3.mp4", "4.mp4"]


def test_tasks_of_one_set_share_the_headers(toy_folder, opened, tmp_path):
    config = EncodeConfig(
        source=str(toy_folder / "manifest.jsonl"), out=str(tmp_path / "set"), height=16, width=16,
        videos_per_shard=2, filters={"duration_s": FilterRange(max=0.95)}, num_parts=2, part=1,
    )  # fmt: skip
    first = ShardEncoder(config)
    assert 0 < len(first.manifest.entries) < len(opened) == 12
    first.run()
    second = ShardEncoder(replace(config, part=0))
    assert second.run().open_shards == 0
    assert len(opened) == 12
    assert second.manifest == first.manifest
