"""Laws of lengths and gaps through the real sampler: with an exact oracle for a network, what comes out is known.

The bounds are those of the table in docs/oracles.md. ``tests/evaluation/oracles/test_gaussian.py`` tests what the
frames hold, and so where they are inserted.
"""

import json

import numpy as np
import pytest
import torch

from flowception import rng
from flowception.evaluation.oracles.content_free import ContentFreeOracle
from flowception.flow import ProcessConfig, draw_clips

CLIPS = 20_000
FOUR_LENGTHS, FIXED = "uniform {15, 20, 25, 30}", "fixed 19"


def tv(length_law, case, rule, num_steps, clips=CLIPS):
    return length_law.measure(length_law.CASES[case], rule, num_steps, clips)["total_variation"]


def test_the_oracle_knows_the_mean_of_what_is_missing():
    """Its rates against simulated training draws: missing frames per visible one, by number of visible frames."""
    law = {5: 0.5, 8: 0.2, 12: 0.3}
    config = ProcessConfig(insertion_schedule="cosine", insertion_share=1.0)
    clips, clock = 200_000, 0.4
    u_frame = torch.from_numpy(
        rng.uniforms(0, rng.Stream.FRAME, clip=torch.arange(clips).numpy()[:, None], frame=range(12))
    )
    num_frames = torch.tensor(list(law))[torch.multinomial(torch.tensor(list(law.values())), clips, replacement=True)]
    at_clock = torch.full((clips,), clock, dtype=torch.float64)
    draws = draw_clips(config, num_frames, at_clock, torch.zeros(clips), u_frame)
    table = ContentFreeOracle(law, config.schedule(), 3).rate_table(clock, 12)
    for visible in range(3, 9):
        rows = draws.visible_frames == visible
        missing = draws.missing[rows].double()
        assert missing.sum(dim=1).mean().item() / visible == pytest.approx(table[visible].item(), abs=0.03)
        # Every gap has the same share, the last as the first.
        first_gap, last_gap = missing[:, 0].mean().item(), missing.sum(dim=1).mean().item() / visible
        assert first_gap == pytest.approx(last_gap, abs=0.06)


@pytest.mark.parametrize(("num_steps", "bound"), [(25, 0.05), pytest.param(50, 0.03, marks=pytest.mark.long)])
def test_thinning_keeps_the_length_law_of_four_lengths(length_law, num_steps, bound):
    assert tv(length_law, FOUR_LENGTHS, "thinning", num_steps) <= bound


@pytest.mark.parametrize("num_steps", [10, 25, pytest.param(50, marks=pytest.mark.long)])
def test_thinning_gives_a_fixed_length_to_every_clip(length_law, num_steps):
    assert tv(length_law, FIXED, "thinning", num_steps) <= 0.001


@pytest.mark.parametrize("rule", ["bernoulli", "poisson"])
@pytest.mark.parametrize(("law", "expected"), [(FOUR_LENGTHS, (0.313, 0.322)), (FIXED, (0.300, 0.309))])
def test_the_other_rules_have_the_bias_of_the_design(length_law, rule, law, expected):
    seen = tv(length_law, law, rule, 50, clips=8000)
    assert seen == pytest.approx(expected[rule == "poisson"], abs=0.03)


@pytest.mark.parametrize("num_steps", [10, 50])
def test_known_gaps_are_filled_exactly(length_law, num_steps):
    assert tv(length_law, "gaps of 3, 0, 7", "thinning", num_steps, clips=500) == 0


def test_gaps_of_unknown_size_keep_their_joint_law(length_law):
    assert tv(length_law, "gaps of 0, 3 or 8", "thinning", 50, clips=5000) <= 0.1


def test_bimodal_lengths(length_law):
    assert tv(length_law, "bimodal {8, 40}", "thinning", 50, clips=8000) <= 0.06


def test_with_no_start_frame_the_clock_that_a_context_frame_is_shown_is_enough(length_law):
    assert tv(length_law, "image, no start frame", "thinning", 50, clips=10_000) <= 0.03


@pytest.mark.long
def test_the_order_of_the_error_in_the_number_of_steps(length_law):
    """Thinning errs by the first power of the step; halving the step halves the error (slope of log over log)."""
    law = length_law.Case(laws=[length_law.uniform(*range(1, 20))], start_frames=1)
    steps = [10, 20, 40, 80]
    errors = [length_law.measure(law, "thinning", n, 40_000)["total_variation"] for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -1.2 <= slope <= -0.75


def test_the_benchmark_writes_what_it_says(length_law, tmp_path):
    arguments = ["--clips", "300", "--steps", "5", "--cases", FIXED, "--rules", "thinning", "bernoulli"]
    json_path, picture = tmp_path / "a" / "law.json", tmp_path / "law.png"
    assert length_law.main([*arguments, "--json", str(json_path), "--picture", str(picture)]) == 0
    rows = json.loads(json_path.read_text())
    assert [(row["case"], row["rule"], row["num_inference_steps"]) for row in rows] == [
        (FIXED, "thinning", 5),
        (FIXED, "bernoulli", 5),
    ]
    assert rows[0]["total_variation"] == 0
    assert rows[0]["histogram"] == {"19": 1.0}
    assert picture.stat().st_size > 1000
