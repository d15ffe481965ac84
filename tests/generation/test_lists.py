"""One set made by several jobs: the clips and the list of one job."""

import json

import pytest

from flowception.errors import ConfigError
from flowception.generation.lists import check_part, first_clips
from flowception.generation.run import GenerateOptions, generate


@pytest.fixture
def job(make_run, tmp_path):
    def run(out, part=0, num_parts=1, num_clips=5):
        """Five clips of three classes in batches of two: three batches."""
        settings = {"num_inference_steps": 4, "batch_size": 2, "seed": 7, "max_frames": 9, "device": "cpu"}
        return generate(
            GenerateOptions(
                run_dir=make_run(),
                out_dir=tmp_path / out,
                num_clips=num_clips,
                part=part,
                num_parts=num_parts,
                **settings,
            )
        )

    return run


@pytest.fixture
def pixels(monkeypatch):
    """Folder and clip to its pixels before H.264, whose encoder does not always decide alike."""
    written = {}

    def write_mp4(path, video, *, fps):
        written.setdefault(path.parent.name, {})[path.name] = video.tobytes()

    monkeypatch.setattr("flowception.generation.run.write_mp4", write_mp4)
    return written


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("clip")}


@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_set_is_the_same_to_the_bit_at_any_number_of_jobs(job, pixels, tmp_path, num_parts):
    whole = job("whole")
    records = []
    for part in reversed(range(num_parts)):
        assert not (tmp_path / "parts/clips.jsonl").exists()
        records += job("parts", part, num_parts)
    assert len(pixels["whole"]) == 5
    assert pixels["parts"] == pixels["whole"]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(records, key=lambda record: record["file"]) == whole
    assert [record["class_label"] for record in whole] == [0, 1, 2, 0, 1]
    sheets = [path.name for path in (tmp_path / "parts").glob("*.png") if path.name.startswith("part")]
    assert len(sheets) == min(num_parts, 3), "a job without clips draws none"


def test_a_set_is_listed_anew_when_another_takes_its_place(job, tmp_path):
    for part in range(2):
        job("out", part, 2)
    job("out", 0, 2, num_clips=3)
    job("out", 1, 2, num_clips=3)
    assert [line["seed"] for line in lines(tmp_path)] == [7, 8, 9]


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out/clips.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("num_clips", "batch_size"), [(1, 1), (16, 4), (17, 4), (3, 8)])
def test_parts_make_every_batch_once(num_clips, batch_size):
    batches = list(range(0, num_clips, batch_size))
    for num_parts in range(1, 7):
        parts = [list(first_clips(num_clips, batch_size, part, num_parts)) for part in range(num_parts)]
        assert sorted(sum(parts, [])) == batches
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("part", "num_parts"), [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_there_is_not_is_refused(part, num_parts):
    with pytest.raises(ConfigError, match=f"--part is {part} of --num-parts {num_parts}"):
        check_part(part, num_parts)
