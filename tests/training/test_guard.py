"""Steps that the guards skip, on two real processes, and the result of a run that rolls back."""

import json
import math

import numpy as np
import pytest

from flowception.checkpoint.format import checkpoint_dir, list_steps, read_manifest
from flowception.checkpoint.reader import hashes, read_full
from flowception.data.step_plan import Cursor
from flowception.errors import ConfigError
from flowception.training.config import load_config
from flowception.training.data import open_data
from flowception.training.distributed.collectives import Ranks
from flowception.training.distributed.zero import StepOutcome
from flowception.training.guard import NO_CLIPS, SPIKE, Guard, GuardConfig, GuardState
from tests.distributed_worker import run_on_two_ranks
from tests.training.workers.toy_set import write_config, write_set

pytestmark = [pytest.mark.xdist_group("guards"), pytest.mark.timeout(900)]

WORKER = "tests.training.workers.guard_worker"
POISONED_STEP = 3
REASONS = {"loss": "the loss is not finite", "gradient": "the gradient is not finite", "spike": "gradient spike"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A set, and the keys of its clips by (step from 1, pack) of epoch 0."""
    folder = tmp_path_factory.mktemp("guards")
    data = write_set(folder / "shards", clips=120)
    config = write_config(folder / "plan.yaml", folder / "none", data, model__num_layers=1)  # as in the worker
    plan = open_data(load_config([config])).plan
    assert plan.steps_in_epoch(0) >= 10
    keys = {}
    for number in range(plan.steps_in_epoch(0)):
        for pack in plan.step(Cursor(0, number)).packs:
            keys[number + 1, pack.number] = [plan.index.key(int(row)) for row in pack.rows]
    return folder, keys


def of_steps(keys, steps):
    return [key for (step, _), found in sorted(keys.items()) if step in steps for key in found]


def rank_1_of(keys):
    """A clip that rank 1 trains on in the poisoned step."""
    return keys[POISONED_STEP, 1][:1]


def in_a_row(keys):
    return [keys[step, step % 3][0] for step in (5, 6, 7)]


@pytest.fixture(scope="module")
def runs(clips):
    folder, keys = clips
    arguments = {
        "in_a_row": in_a_row(keys),
        "clips_in_a_row": of_steps(keys, (5, 6, 7)),
        "rank_1": rank_1_of(keys),
    }
    return folder, keys, run_on_two_ranks(WORKER, "scenarios", folder=str(folder), **arguments)


@pytest.fixture(scope="module")
def hard_runs(runs):
    folder, keys, _ = runs
    arguments = {
        "in_a_row": in_a_row(keys),
        "hopeless": of_steps(keys, range(5, 11)),
        "twice": [keys[step, 0][-1] for step in (4, 5, 8, 9)],
    }
    return folder, keys, run_on_two_ranks(WORKER, "hard_rollbacks", folder=str(folder), **arguments)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(run_dir):
    return [line for line in lines(run_dir / "skipped.jsonl") if "reason" in line]


def check_one_refused_step(run_dir, keys, harm):
    """Only the poisoned step was skipped: the saved state is as before it, and training then continues."""
    saved = [hashes(checkpoint_dir(run_dir, step)) for step in range(6)]
    assert saved[POISONED_STEP] == saved[POISONED_STEP - 1]
    others = [saved[step] != saved[step - 1] for step in range(1, 6) if step != POISONED_STEP]
    assert all(others)
    for kind in ("weights", "ema"):
        assert all(tensor.isfinite().all() for tensor in read_full(checkpoint_dir(run_dir, 5), kind).values())
    (line,) = refused(run_dir)
    assert (line["step"], line["reason"]) == (POISONED_STEP, REASONS[harm])
    assert line["clips"] == of_steps(keys, [POISONED_STEP])
    assert (line["grad_norm"] is None) == (harm == "gradient")
    assert [loss is None for loss in line["loss_by_rank"]] == [False, harm == "loss"]
    found = [{"rank": 1, "pack": 1, "clips": keys[POISONED_STEP, 1]}] if harm == "loss" else []
    assert line["packs_not_finite"] == found
    if harm == "spike":
        assert line["grad_norm"] > 10 * line["usual_grad_norm"]
    skipped = [line["skipped_steps"] for line in lines(run_dir / "metrics.jsonl")]
    assert skipped == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("harm", REASONS)
def test_one_bad_step_on_one_rank_is_skipped_by_all(runs, harm):
    folder, keys, results = runs
    assert results[f"{harm}-3-fp32"] is True
    check_one_refused_step(folder / f"{harm}-3-fp32", keys, harm)


@pytest.mark.long
def test_the_same_at_every_stage_and_type(clips):
    folder, keys = clips
    settings = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    settings.remove((3, "fp32"))  # tested above
    arguments = {"rank_1": rank_1_of(keys), "settings": settings}
    results = run_on_two_ranks(WORKER, "harms", folder=str(folder), **arguments)
    assert results == dict.fromkeys(results, True)
    assert len(results) == 21
    for name in results:
        check_one_refused_step(folder / name, keys, name.split("-")[0])


def test_a_resumed_run_restores_the_usual_norm(runs):
    folder, _, results = runs
    assert (results["spike_stopped"], results["spike_resumed"]) == (False, True)
    assert refused(folder / "spike_stopped") == refused(folder / "spike-3-fp32")


def test_a_rolled_back_run_equals_one_where_the_clips_were_always_bad(runs):
    folder, keys, results = runs
    assert results["rolled"] is results["oracle"] is True
    assert list_steps(folder / "rolled") == [0, 6, 9, 12]
    assert not list((folder / "rolled" / "checkpoints").glob("*.damaged")), "a whole checkpoint was taken for damaged"
    assert hashes(checkpoint_dir(folder / "rolled", 12)) == hashes(checkpoint_dir(folder / "oracle", 12))
    found, expected = lines(folder / "rolled" / "metrics.jsonl"), lines(folder / "oracle" / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 13))
    for name in ("loss", "clips", "bad_clips", "grad_norm", "epoch"):
        assert [line[name] for line in found] == [line[name] for line in expected], name
    assert [line["clips"] for line in found[4:7]] == [0, 0, 0]
    assert found[-1]["epoch"] == 1, "the next epoch was not seen"
    state = read_manifest(checkpoint_dir(folder / "rolled", 12)).state
    assert sorted(state["guard"]["quarantine"]) == sorted(of_steps(keys, (5, 6, 7)))
    assert state["plan_quarantine"] == sorted(of_steps(keys, (5, 6, 7)))
    assert (state["quarantine"], state["optimizer_steps"]) == ({}, 9)


def test_a_rollback_goes_before_the_first_skipped_step_and_is_recorded(runs):
    journal = lines(runs[0] / "rolled" / "skipped.jsonl")
    assert [line["step"] for line in journal] == [5, 6, 7, 7]
    number = len(of_steps(runs[1], (5, 6, 7)))
    assert journal[-1] == {"step": 7, "rollback_to": 3, "rollbacks": 1, "left_out": number}


@pytest.mark.long
def test_frequent_saves_and_few_kept_leave_the_rollback_target(hard_runs):
    folder, _, results = hard_runs
    assert results["tight"] is True
    assert [line["rollback_to"] for line in lines(folder / "tight" / "skipped.jsonl") if "rollback_to" in line] == [4]


@pytest.mark.long
def test_a_kill_right_after_a_rollback_loses_nothing(hard_runs):
    """The resumed run still excludes the clips, even though they are no longer harmful."""
    folder, _, results = hard_runs
    assert results["after_the_kill"] is True
    assert hashes(checkpoint_dir(folder / "killed", 12)) == hashes(checkpoint_dir(folder / "rolled", 12))


@pytest.mark.long
def test_a_run_stopped_among_skipped_steps_makes_the_same_decision(hard_runs):
    folder, _, results = hard_runs
    assert (results["stopped"], results["resumed"]) == (False, True)
    assert hashes(checkpoint_dir(folder / "stopped", 12)) == hashes(checkpoint_dir(folder / "rolled", 12))


@pytest.mark.long
def test_a_run_without_progress_ends_and_names_the_journal(hard_runs):
    folder, _, results = hard_runs
    assert results["hopeless"].startswith("GuardError: skipped 2 steps in a row up to step 8")
    assert str(folder / "hopeless" / "skipped.jsonl") in results["hopeless"]
    assert "guard.max_rollbacks=1" in results["hopeless"]


@pytest.mark.long
def test_applied_steps_between_rollbacks_are_progress(hard_runs):
    folder, _, results = hard_runs
    assert results["twice"] is True
    assert [line["rollbacks"] for line in lines(folder / "twice" / "skipped.jsonl") if "rollback_to" in line] == [1, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("spike_factor", 1.0), ("spike_memory_steps", 0), ("max_skipped_in_a_row", 0), ("max_rollbacks", -1)]
    + [("hang_timeout_s", 0.0), ("data_stall_warning_s", -1.0)],
)
def test_config_out_of_range_is_an_error(name, value):
    with pytest.raises(ConfigError, match=f"guard.{name} must be .*, got {value}$"):
        GuardConfig(**{name: value})


def test_the_usual_norm_is_a_plain_then_an_exponential_mean(tmp_path):
    """Closed form: after the first M norms, weights r (1 - r)^(n - i) with r = 1 / M, and the rest for the mean of the
    first M."""
    config = GuardConfig(spike_memory_steps=4, spike_factor=3.0)
    guard, state = make_guard(config, tmp_path), GuardState()
    norms = np.random.default_rng(0).uniform(1, 2, 9)
    for step, norm in enumerate(norms, 1):
        assert not guard._is_spike(state, 1e9) or step > 4
        guard.note(state, step, None, StepOutcome(float(norm), None), [], [], lambda plan: [])
    weights = 0.25 * 0.75 ** np.arange(5)[::-1]
    expected = norms[:4].mean() * 0.75**5 + weights @ norms[4:]
    assert state.usual_norm == pytest.approx(expected, rel=1e-12)
    refuse = guard.refusal(state, [1.0, 2.0], clips=3)
    assert refuse(2.99 * expected) is None
    assert refuse(3.01 * expected) == SPIKE
    assert guard.refusal(state, [1.0, 2.0], clips=0)(1.0) == NO_CLIPS
    assert guard.refusal(state, [1.0, math.inf], clips=3)(1.0) == REASONS["loss"]
    assert make_guard(GuardConfig(spike_factor=None), tmp_path).refusal(state, [1.0], 3)(1e30) is None


def make_guard(config, run_dir):
    return Guard(config, run_dir, Ranks(rank=0, local_rank=0, world_size=1, device=None))
