"""Clips sampled during training: by all ranks, with the run's own tasks, and without any change of the training."""

import json

import numpy as np
import pytest
import torch

from flowception.checkpoint.format import checkpoint_dir
from flowception.checkpoint.reader import hashes
from flowception.codecs.patchify import PatchifyCodec
from flowception.codecs.video_file import read_video
from flowception.errors import ConfigError
from flowception.generation.training_sampler import TrainingSampler
from flowception.generation.video import write_mp4
from flowception.nn.build import build_backbone
from flowception.nn.init import initialize
from flowception.training.config import load_config
from flowception.training.data import heldout_plan, open_data
from flowception.training.samples import SamplesConfig
from tests.distributed_worker import run_distributed
from tests.training.workers.samples_worker import settings
from tests.training.workers.toy_set import write_config, write_set

pytestmark = [pytest.mark.xdist_group("runs"), pytest.mark.timeout(900)]
WORKER = "tests.training.workers.samples_worker"
SAMPLER_KEYS = ("num_clips", "num_inference_steps", "max_frames", "guidance")


def decodable_set(folder):
    return write_set(folder, codec_fingerprint=PatchifyCodec(2).fingerprint(), channels=12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    decodable_set(folder / "shards")
    results = run_distributed(WORKER, "scenarios", 2, folder=str(folder), timeout_s=800)
    assert results == [dict.fromkeys(("plain", "sampled", "ordered", "blocked"), True)] * 2
    return folder


def listed(folder):
    return [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]


def test_two_ranks_write_clips_and_a_contact_sheet(runs):
    samples = runs / "sampled" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["step_00000002", "step_00000004"]
    for folder in samples.iterdir():
        records = listed(folder)
        assert [record["seed"] for record in records] == list(range(5))
        for record in records:
            assert len(read_video(folder / record["file"])) == record["frames"] == record["latent_frames"]
        assert (folder / "contact.png").is_file()
    before, after = (listed(samples / f"step_0000000{step}") for step in (2, 4))
    assert [(r["of"], r["task"]) for r in before] == [(r["of"], r["task"]) for r in after]


def test_samples_do_not_change_training_by_a_bit(runs):
    plain, sampled = (hashes(checkpoint_dir(runs / name, 4)) for name in ("plain", "sampled"))
    assert plain == sampled


def test_a_prescribed_order_gets_the_length_of_the_clip(runs):
    data = open_data(load_config([runs / "ordered.yaml"]))
    records = listed(runs / "ordered" / "samples" / "step_00000004")
    for record in records:
        (row,) = data.reader.index.rows_of([record["of"]])
        assert record["latent_frames"] == data.reader.index.clips["frames"][row]


def test_samples_that_cannot_be_written_do_not_end_training(runs):
    assert (runs / "blocked" / "samples").is_file()
    assert hashes(checkpoint_dir(runs / "blocked", 4)) == hashes(checkpoint_dir(runs / "plain", 4))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A sampler for any rank and world size, and a network that counts its calls."""
    folder = tmp_path_factory.mktemp("alone")
    data_folder = decodable_set(folder / "shards")
    model = None

    class Counted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.spec, self.calls = inner, inner.spec, 0

        def forward(self, pack):
            self.calls += 1
            return self.inner(pack)

    def run(rank, world_size, **changes):
        nonlocal model
        name = f"rank_{rank}_of_{world_size}"
        wanted = settings(samples__every_steps=1, samples__num_clips=5, **changes)
        config = load_config([write_config(folder / f"{name}.yaml", folder / name, data_folder, **wanted)])
        data = open_data(config)
        if model is None:
            model = Counted(build_backbone(config.model).eval())
            initialize(model.inner, 3)
            for parameter in model.inner.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
        plan, cpu = heldout_plan(config, data), torch.device("cpu")
        wanted = {name: getattr(config.samples, name) for name in SAMPLER_KEYS} | {"folder": folder / name / "samples"}
        sampler = TrainingSampler(config, data.reader, plan, **wanted, rank=rank, world_size=world_size, device=cpu)
        model.calls = 0
        with torch.no_grad():
            records = sampler.sample(model, 7)
        return sampler, records, folder / name / "samples" / "step_00000007", model.calls

    return run


def test_clips_and_evaluations_do_not_depend_on_the_number_of_ranks(alone, monkeypatch):
    """Compared before H.264 encoding, where one pixel that rounds differently changes a complete block."""
    written = {}

    def keep_and_write(path, video, *, fps):
        written[path] = video.astype(int)
        write_mp4(path, video, fps=fps)

    monkeypatch.setattr("flowception.generation.training_sampler.write_mp4", keep_and_write)
    _, records, folder, calls = alone(0, 1)
    assert [record["seed"] for record in records] == list(range(5))
    assert len({record["task"] for record in records}) > 1
    parts = [alone(rank, 3) for rank in range(3)]
    assert [found for _, _, _, found in parts] == [calls] * 3
    together = [(record, part) for _, part_records, part, _ in parts for record in part_records]
    assert [record["seed"] for record, _ in together] == list(range(5))
    for whole, (record, part) in zip(records, together, strict=True):
        assert {**record} == {**whole}
        ours, theirs = written[folder / whole["file"]], written[part / record["file"]]
        assert ours.shape == theirs.shape
        assert (
            np.abs(ours - theirs).max() <= 1
        )  # latents agree to 1e-4 (test_predictor), so a pixel level may differ by one


def test_given_frames_are_from_the_held_out_clip(alone):
    sampler, _, _, _ = alone(0, 1)
    seen = 0
    for row, task, context, _ in sampler.given:
        if task == "t2v":
            assert context is None
            continue
        seen += 1
        wanted = sampler.reader.read(row, context.places).float()
        assert torch.equal(context.frames, wanted)
        if task in ("interpolation", "completion"):
            assert context.num_start_frames == 0
    assert seen


@pytest.mark.parametrize("name", ["every_steps", "num_clips", "num_inference_steps", "max_frames"])
def test_less_than_one_is_an_error(name):
    with pytest.raises(ConfigError, match=f"samples.{name} must be an integer >= 1.*, got 0"):
        SamplesConfig(**{name: 0})
