"""A set split over several jobs has the clips and list of a single job."""

import json

import numpy as np
import pytest

from flowception.errors import ConfigError
from flowception.generation.generate import GenerateOptions, generate
from flowception.generation.outputs import begin_lists, check_part, first_clips, write_lists


@pytest.fixture
def pixels(monkeypatch):
    """Pixels by folder and clip before H.264, whose encoder is not deterministic."""
    written = {}

    def write_mp4(path, video, *, fps):
        written.setdefault(path.parent.name, {})[path.name] = video.tobytes()

    monkeypatch.setattr("flowception.generation.clip.write_mp4", write_mp4)
    monkeypatch.setattr("flowception.generation.clip.Growth.save", lambda *arguments: None)
    return written


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("clip")}


def test_the_set_is_bitwise_the_same_for_any_number_of_jobs(make_run, pixels, tmp_path):
    """Three clips in two batches, by one job and by three, one of which has no batch."""

    def job(out, part=0, num_parts=1):
        settings = {"num_inference_steps": 4, "batch_size": 2, "seed": 7, "max_frames": 9, "device": "cpu"}
        options = GenerateOptions(
            run_dir=make_run(), out_dir=tmp_path / out, num=3, part=part, num_parts=num_parts, **settings
        )
        return generate(options)

    whole, records = job("whole"), []
    for part in reversed(range(3)):
        assert not (tmp_path / "parts/clips.jsonl").exists()
        records += job("parts", part, 3)
    assert len(pixels["whole"]) == 3
    assert pixels["parts"] == pixels["whole"]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(records, key=lambda record: record["seed"]) == whole
    assert [record["class_label"] for record in whole] == [0, 1, 2]
    sheets = {path.name for path in (tmp_path / "parts").glob("part*.png")}
    assert sheets == {"part_0000_of_0003.png", "part_0001_of_0003.png"}, "a job without clips draws none"


def write_part(folder, part, num_parts, numbers):
    """Write a job's lists for made-up clips."""
    names = {"task": "t2v", "prompt": None, "class_name": None, "class_label": None}
    records = [{"file": f"clip_{number:04d}.mp4", "seed": 7 + number, **names} for number in numbers]
    begin_lists(folder, part, num_parts)
    write_lists(folder, part, num_parts, records, [np.zeros((2, 4, 4, 3), np.uint8)] * len(records))


def listed(folder):
    return [json.loads(line)["seed"] - 7 for line in (folder / "clips.jsonl").read_text().splitlines()]


def test_the_list_is_in_clip_order_whichever_job_ends_last(tmp_path):
    numbers = [[0, 1, 4, 5, 9_999, 10_000], [2, 3, 6, 7]]
    for order in ([0, 1], [1, 0]):
        folder = tmp_path / str(order[0])
        folder.mkdir()
        write_part(folder, order[0], 2, numbers[order[0]])
        assert not (folder / "clips.jsonl").exists()
        write_part(folder, order[1], 2, numbers[order[1]])
        assert listed(folder) == [0, 1, 2, 3, 4, 5, 6, 7, 9_999, 10_000]


def test_a_set_that_replaces_another_is_listed_at_the_end(tmp_path):
    for numbers in ([[0, 1], [2, 3]], [[0, 1], [2]]):
        for part in range(2):
            write_part(tmp_path, part, 2, numbers[part])
    assert listed(tmp_path) == [0, 1, 2]
    write_part(tmp_path, 0, 1, [0])
    assert listed(tmp_path) == [0]
    begin_lists(tmp_path, 0, 1)
    assert not (tmp_path / "clips.jsonl").exists(), "a job that is killed leaves no list of what was there before"


@pytest.mark.parametrize(("num_clips", "batch_size"), [(1, 1), (16, 4), (17, 4), (3, 8)])
def test_parts_make_every_batch_once(num_clips, batch_size):
    batches = list(range(0, num_clips, batch_size))
    for num_parts in range(1, 7):
        parts = [list(first_clips(num_clips, batch_size, part, num_parts)) for part in range(num_parts)]
        assert sorted(sum(parts, [])) == batches
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("part", "num_parts"), [(2, 2), (-1, 2), (0, 0)])
def test_a_part_out_of_range_is_refused(part, num_parts):
    with pytest.raises(ConfigError, match=f"`part` must be .*, got {part} and {num_parts}"):
        check_part(part, num_parts)
