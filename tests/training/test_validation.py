from dataclasses import replace

import numpy as np
import pytest
import torch

from flowception.data.pack import build_pack
from flowception.data.step_plan import PackPlan
from flowception.errors import ConfigError
from flowception.packing.layout import ModelOutput
from flowception.training.config import load_config
from flowception.training.data import heldout_plan, mean_log_rate, open_data
from flowception.training.distributed.collectives import Ranks
from flowception.training.validation import Validation, ValidationConfig
from tests.training.workers.toy_set import write_config, write_set


class Oracle:
    """Stand-in for the engine: the exact velocity plus an error, and a rate of 1."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, pack):
        self.calls += 1
        return ModelOutput(pack.velocity_target + self.error, torch.zeros(len(pack.time)))

    def eval(self):
        pass

    def train(self):
        pass


def ranks(rank=0, world_size=1):
    return Ranks(rank, rank, world_size, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    config = load_config([write_config(folder / "c.yaml", folder / "run", write_set(folder / "shards"))])
    opened = open_data(config)
    return config, opened, heldout_plan(config, opened)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr("flowception.training.validation.all_sum", lambda values, device: values)


LAWS = {"uniform": 0.8, "random": 1.0, "left_to_right": 0.5, "full_sequence": 0.5, "autoregressive": 0.5}


@pytest.mark.parametrize("time", [0.25, 1.5, 4.5])
@pytest.mark.parametrize("law", LAWS)
def test_every_clip_that_has_a_time_in_training_is_measured_at_it(data, law, time):
    config, opened, _ = data
    process = replace(config.process, delay_law=law, insertion_share=LAWS[law])
    plan = heldout_plan(replace(config, process=process), opened)
    frames = {int(row): int(plan.index.clips["frames"][row]) for row in plan.rows}
    end = {"full_sequence": 1, "random": 1}.get(law, 2)  # random: with share 1 there are no times above 1
    context = plan.clip_draws(PackPlan(0, 0, plan.rows, np.arange(len(plan.rows)))).clips.task.tolist()
    generated = {row: n - (task == 1) for (row, n), task in zip(frames.items(), context)}
    expected = {row for row in frames if time < (generated[row] if law == "autoregressive" else end)}
    packs = Validation(ValidationConfig(global_times=[time]), plan, opened.reader, ranks())._packs.get(time, [])
    assert {int(row) for pack in packs for row in pack.rows} == expected
    for pack in packs:
        draws = plan.clip_draws(pack).clips
        assert draws.global_time.tolist() == pytest.approx([time] * len(pack.rows))


@pytest.mark.parametrize("error", [0.0, 0.5, -2.0])
def test_the_loss_is_the_mean_square_error(data, alone, error):
    config, opened, plan = data
    result = Validation(ValidationConfig(num_clips=6), plan, opened.reader, ranks()).run(Oracle(error))
    assert result["validation/loss/velocity"] == pytest.approx(error**2, abs=1e-12)
    assert result["validation/loss/insertion"] == pytest.approx(1.0)  # rate 1: 1 - k log 1
    expected = error**2 + config.process.insertion_loss_weight
    assert result["validation/loss"] == pytest.approx(expected)
    assert result["validation/velocity/0.25"] == pytest.approx(error**2, abs=1e-12)


def test_ranks_divide_the_packs_and_run_the_same_number_of_forwards(data):
    _, opened, plan = data
    config = ValidationConfig(num_clips=9, global_times=[1.5])
    parts = []
    for world_size in (1, 2, 4):
        engines = [Oracle(0.5) for _ in range(world_size)]
        sums = np.zeros(4)
        for rank in range(world_size):
            validation = Validation(config, plan, opened.reader, ranks(rank, world_size))
            sums += validation._sums(engines[rank], validation._packs[1.5])
        assert len({engine.calls for engine in engines}) == 1
        parts.append(sums)
    assert len(validation._packs[1.5]) > 1
    assert np.allclose(parts[0], parts[1])
    assert np.allclose(parts[0], parts[2])


def test_the_same_clips_and_noise_each_time_and_only_held_out_ones(data):
    _, opened, plan = data
    packs = [
        [build_pack(plan, pack, opened.reader) for pack in validation._packs[0.5]]
        for validation in (
            Validation(ValidationConfig(global_times=[0.5]), plan, opened.reader, ranks()) for _ in range(2)
        )
    ]
    for first, second in zip(*packs, strict=True):
        assert first.noisy.equal(second.noisy)
    held_out = {opened.reader.index.key(int(row)) for row in opened.heldout_rows}
    assert {key for pack in packs[0] for key in pack.keys} == held_out
    assert not held_out & {opened.reader.index.key(int(row)) for row in opened.plan.rows}


def test_mean_log_rate_matches_the_draws(data):
    _, opened, _ = data
    plan = opened.plan
    draws = plan.clip_draws(PackPlan(0, 0, plan.rows, np.arange(len(plan.rows)))).clips
    missing = draws.missing[draws.insertion_mask].double()
    assert mean_log_rate(plan) == pytest.approx(float(missing.mean().log()))


def test_config_out_of_range_is_an_error():
    for wrong in ({"every_steps": 0}, {"num_clips": 0}, {"global_times": []}, {"global_times": [-1.0]}):
        with pytest.raises(ConfigError, match=f"validation.{next(iter(wrong))}"):
            ValidationConfig(**wrong)
