"""The claims study: equal budgets, the rule of verdicts, and results of every arm."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.claims import page as claims_page
from benchmarks.claims import run as claims
from benchmarks.claims.arms import (
    ARMS,
    BUDGETS,
    EQUAL_FLOPS,
    EQUAL_FLOW_FRAMES,
    FLOWCEPTION,
    Budget,
    result_name,
    spend,
)
from benchmarks.claims.training import Study
from benchmarks.claims.verdicts import CLAIMS, DOES_NOT_HOLD, HOLDS, NOT_DECIDED, judge, judge_claims, verdict_of
from benchmarks.claims.world import (
    SCORED_FRAMES,
    make_data,
    real_tracks,
    reference,
    references,
    score,
    to_latents,
    to_positions,
)
from flowception.errors import ConfigError
from flowception.packing.flops import training_flops
from flowception.shards.reader import ShardReader
from flowception.training.data import open_data

ROOT = Path(__file__).resolve().parents[2]
TINY = Budget(
    seeds=2,
    training_flops=4e7,
    words=("token_budget=128", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"),
    data_clips=160,
    sampled_clips=12,
    num_inference_steps=2,
)


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path, TINY)
    make_data(study.data, TINY.data_clips)
    return study


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_stops_at_the_first_step_with_the_same_flops(study, name):
    plan = open_data(study.config(ARMS[name], seed=1)).plan
    spent = spend(plan, EQUAL_FLOPS, TINY.training_flops)
    step_flops = spent.training_flops / spent.steps
    assert TINY.training_flops <= spent.training_flops < TINY.training_flops + 2 * step_flops
    shorter = spend(plan, EQUAL_FLOPS, 0.5 * TINY.training_flops)
    assert shorter.steps < spent.steps
    assert spend(plan, "steps", spent.steps - 1).training_flops < TINY.training_flops


def test_flops_and_flow_frames_by_hand_for_full_sequence(study):
    """With full-sequence, every frame of every clip is visible and has a velocity loss."""
    plan = open_data(study.config(ARMS["full_sequence"], seed=0)).plan
    spent = spend(plan, "trained_clips", len(plan.rows))  # the full first epoch
    frames = plan.index.clips["frames"].astype(int)
    assert spent.trained_clips == TINY.data_clips
    assert spent.flow_frames == frames.sum()
    assert spent.tokens == 2 * frames.sum()
    assert spent.training_flops == pytest.approx(training_flops(plan.spec, frames, 1, 1).sum())


def test_autoregression_continues_to_flowceptions_flow_frames(study):
    ours = study.spent_at(ARMS[FLOWCEPTION], 0, EQUAL_FLOPS)
    arm = ARMS["autoregressive_full"]
    first, second = (study.spent_at(arm, 0, point) for point in arm.measured_at)
    assert first.flow_frames == first.trained_clips  # one frame per clip and pass
    assert second.steps > first.steps
    assert second.flow_frames >= ours.flow_frames > second.flow_frames - second.flow_frames / second.steps * 2


def test_clips_are_stored_as_the_state(study):
    reader = ShardReader(str(study.data))
    assert len(reader.index) == TINY.data_clips
    positions = to_positions(reader.read(0, np.arange(int(reader.index.clips["frames"][0]))).float())
    assert score([positions], chose_lengths=True)["trajectory_error_px"] < 0.02
    assert np.abs(to_positions(to_latents(positions)) - positions).max() < 1e-6


def test_metrics_of_real_and_of_random_clips():
    found = references(200)
    assert found["real"]["trajectory_error_px"] < 0.01
    assert abs(found["real"]["drift_px_per_frame"]) < 1e-3
    assert found["independent_frames"]["trajectory_error_px"] > 2
    assert found["independent_frames"]["frechet_px2"] > 20 * found["real"]["frechet_px2"]


def test_the_frechet_reference_is_the_law_of_any_window_of_frames():
    """First and last frames of the true clips have the same moments, so either end may be compared."""
    first = np.stack([track[:SCORED_FRAMES].ravel() for track in real_tracks(4000)])
    mean, covariance = (moment.numpy() for moment in reference())
    assert np.abs(first.mean(axis=0) - mean).max() < 0.2
    assert np.abs(np.cov(first, rowvar=False) - covariance).max() < 0.35


def test_errors_do_not_depend_on_clip_length():
    random = np.random.default_rng(0)
    tracks = [random.uniform(4, 12, (10, 2)) for _ in range(300)]
    long, short = score(tracks, True), score([track[:6] for track in tracks] + [np.zeros((3, 2))], True)
    assert long["trajectory_error_px"] == pytest.approx(short["trajectory_error_px"], rel=0.05)
    assert (short["sampled_clips"], short["clips_long_enough"]) == (301, 300)
    assert score([np.zeros((3, 2))], True)["trajectory_error_px"] is None


def test_lengths_are_scored_only_for_a_law_that_chooses_them():
    tracks = [np.full((6, 2), 8.0)] * 4
    assert score(tracks, chose_lengths=False)["length_total_variation"] is None
    assert score(tracks, chose_lengths=True)["length_total_variation"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9], HOLDS),
        ([-1.0, -1.1, -0.9], DOES_NOT_HOLD),
        ([1.0, 0.1, 0.05], NOT_DECIDED),  # all positive, but the interval contains zero
        ([0.5, -0.5, 0.1], NOT_DECIDED),
        ([1.0], NOT_DECIDED),
        ([1.0, 1.0, math.nan], NOT_DECIDED),
    ],
)
def test_verdict_of_a_comparison(differences, verdict):
    assert judge("x", differences).verdict == verdict


def test_interval_by_hand():
    """Three seeds: 2.920 standard errors on each side."""
    found = judge("x", [1.0, 2.0, 3.0])
    assert (found.mean, found.seeds, found.seeds_better) == (2.0, 3, 3)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((2 - 2.920 / math.sqrt(3), 2 + 2.920 / math.sqrt(3)))


def test_chance_of_a_wrong_verdict_matches_the_page():
    draws = np.random.default_rng(0).standard_normal((4000, 3))
    verdicts = [judge("x", row).verdict for row in draws]
    assert verdicts.count(HOLDS) / 4000 == pytest.approx(0.05, abs=0.012)
    assert verdicts.count(DOES_NOT_HOLD) / 4000 == pytest.approx(0.05, abs=0.012)


def test_verdict_of_a_claim():
    assert verdict_of([HOLDS, HOLDS]) == HOLDS
    assert verdict_of([HOLDS, NOT_DECIDED]) == NOT_DECIDED
    assert verdict_of([HOLDS, DOES_NOT_HOLD, NOT_DECIDED]) == DOES_NOT_HOLD
    assert verdict_of([]) == NOT_DECIDED


def made_up(better: str | None) -> dict:
    """Results of three seeds where one arm has a third of the errors of the others."""
    names = {name for arm in ARMS.values() for name in arm.results()}
    share = {name: 1 / 3 if name == better else 1.0 for name in names}
    return {
        name: {
            seed: {
                "trajectory_error_px": share[name] * (3 + 0.1 * seed),
                "drift_px_per_frame": share[name] * (0.1 + 0.01 * seed),
                "frechet_px2": share[name] * (2 + 0.1 * seed),
            }
            for seed in range(3)
        }
        for name in names
    }


def test_claims_identify_the_better_arm():
    assert [claim["verdict"] for claim in judge_claims(made_up(FLOWCEPTION), range(3))[:4]] == [HOLDS] * 4
    against = judge_claims(made_up("full_sequence"), range(3))
    assert [claim["verdict"] for claim in against[:2]] == [NOT_DECIDED, DOES_NOT_HOLD]
    # only full attention improved, so a window costs full-sequence more
    assert against[4]["verdict"] == HOLDS
    worse_with_a_window = judge_claims(made_up(FLOWCEPTION), range(3))[4]
    assert worse_with_a_window["verdict"] == DOES_NOT_HOLD
    assert worse_with_a_window["comparisons"][0]["mean"] == pytest.approx(-math.log(3))


def test_claims_without_their_arms_are_skipped():
    results = {name: seeds for name, seeds in made_up(None).items() if "window" not in name}
    assert [claim["letter"] for claim in judge_claims(results, range(3))] == ["a", "b", "b", "b"]


def test_every_comparison_is_between_arms_on_the_page():
    names = {name for arm in ARMS.values() for name in arm.results()}
    for claim in CLAIMS:
        needed = {name for comparison in claim.comparisons for name in comparison.needs()}
        assert needed <= names
        assert needed <= set(claims_page.SHOWN[claim.letter])
    assert result_name("autoregressive_causal", EQUAL_FLOW_FRAMES) in names


def test_the_page_lists_the_arms_that_drift():
    results = made_up(None)
    names = claims_page.SHOWN["b"]
    for name in names[1:]:
        for seed in range(3):
            results[name][seed]["drift_px_per_frame"] = -0.1 - 0.01 * seed
    assert f"above 0: {FLOWCEPTION}." in claims_page._drifting(results, names)
    assert "above 0: none." in claims_page._drifting(results, names[1:])


def test_a_folder_of_another_budget_is_refused(tmp_path):
    claims.study_of(tmp_path, "quick")
    claims.study_of(tmp_path, "quick")
    with pytest.raises(ConfigError, match="another budget"):
        claims.study_of(tmp_path, "full")


def test_the_budgets_have_enough_seeds():
    assert all(budget.seeds >= 3 for budget in BUDGETS.values())
    assert BUDGETS["full"].training_flops > 20 * BUDGETS["quick"].training_flops


@pytest.mark.long
def test_a_tiny_study_has_all_arms_and_is_not_rerun(tmp_path):
    script = (
        "import sys\nfrom benchmarks.claims import run as claims\nfrom tests.benchmarks.test_claims import TINY\n"
        "if __name__ == '__main__':\n    claims.BUDGETS['quick'] = TINY\n    sys.exit(claims.main(sys.argv[1:]))\n"
    )
    (tmp_path / "run.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "run.py"), "--out", str(tmp_path / "out")]
    said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    report = json.loads((tmp_path / "out" / "claims.json").read_text())
    names = {name for arm in ARMS.values() for name in arm.results()}
    assert {(result["name"], result["seed"]) for result in report["results"]} == {(n, s) for n in names for s in (0, 1)}
    assert f"{2 * len(ARMS)} runs, 0 of them done before" in said
    assert len({result["parameters"] for result in report["results"]}) == 1
    for result in report["results"]:
        if result["measured_at_equal"] == EQUAL_FLOPS:
            assert result["training_flops"] == pytest.approx(TINY.training_flops, rel=2 / result["steps"])
        assert result["chooses_length"] == result["arm"].startswith(FLOWCEPTION)
        assert result["sampled_clips"] == TINY.sampled_clips
    assert len(report["claims"]) == len(CLAIMS)
    page = (tmp_path / "out" / "claims.md").read_text()
    assert all(claim["claim"] in page for claim in report["claims"])
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{2 * len(ARMS)} of them done before" in again
    assert json.loads((tmp_path / "out" / "claims.json").read_text()) == report
