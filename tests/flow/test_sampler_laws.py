"""Exact laws through the real sampler: with an oracle for a network, what comes out is known.

The length law is that of issue 2 and of the table in DESIGN.md section 2; the labelled clips are test 3 of
``facts/performance_reliability.md`` section 7.
"""

import itertools
import json

import pytest
import torch

from flowception import rng
from flowception.flow import Context, ProcessConfig, Role, SamplerConfig, draw_clips, sample

CLIPS = 20_000
FOUR_LENGTHS, FIXED = "uniform {15, 20, 25, 30}", "fixed 19"


def tv(length_law, law, rule, num_steps, clips=CLIPS):
    return length_law.measure(length_law.LENGTH_LAWS[law], rule, num_steps, clips)["total_variation"]


def test_the_oracle_knows_the_mean_of_what_is_missing(length_law):
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
    table = length_law.ContentFreeOracle(law, config.schedule(), 3).rate_table(clock, 12)
    for visible in range(3, 9):
        rows = draws.visible_frames == visible
        missing = draws.missing[rows].double()
        assert missing.sum(dim=1).mean().item() / visible == pytest.approx(table[visible], abs=0.03)
        # Every gap has the same share, the last as the first.
        first_gap, last_gap = missing[:, 0].mean().item(), missing.sum(dim=1).mean().item() / visible
        assert first_gap == pytest.approx(last_gap, abs=0.06)


@pytest.mark.parametrize(("num_steps", "bound"), [(25, 0.05), (50, 0.03)])
def test_thinning_keeps_the_length_law_of_four_lengths(length_law, num_steps, bound):
    assert tv(length_law, FOUR_LENGTHS, "thinning", num_steps) <= bound


@pytest.mark.parametrize("num_steps", [10, 25, 50])
def test_thinning_gives_a_fixed_length_to_every_clip(length_law, num_steps):
    assert tv(length_law, FIXED, "thinning", num_steps) <= 0.001


@pytest.mark.parametrize("rule", ["bernoulli", "poisson"])
@pytest.mark.parametrize(("law", "expected"), [(FOUR_LENGTHS, (0.313, 0.322)), (FIXED, (0.300, 0.309))])
def test_the_other_rules_have_the_bias_of_the_design(length_law, rule, law, expected):
    seen = tv(length_law, law, rule, 50, clips=8000)
    assert seen == pytest.approx(expected[rule == "poisson"], abs=0.03)


def test_known_gaps_are_filled_exactly():
    """Three gaps with 3, 0 and 7 missing frames."""
    wanted = torch.tensor([3.0, 0.0, 7.0])

    def predict(state):
        is_given = state.roles == Role.CONTEXT_ACTIVE
        gap = torch.cumsum(is_given, 0) - 1  # sites count gaps over all clips, three each
        size = torch.bincount(gap, minlength=3 * 200)
        missing = wanted.repeat(200) + 1 - size
        return torch.zeros_like(state.frames), (missing / size)[gap]

    context = Context(frames=torch.zeros(3, 1, 1, 1), active=[True] * 3, num_start_frames=0)
    config = SamplerConfig(num_inference_steps=50)
    result = sample(predict, frame_shape=(1, 1, 1), batch_size=200, config=config, context=[context] * 200)
    sizes = torch.nonzero(result.roles == Role.CONTEXT_ACTIVE).flatten().diff(append=torch.tensor([len(result.roles)]))
    assert (sizes.view(200, 3) == torch.tensor([4, 1, 8])).all()


LENGTH, SPACING = 5, 1.5


def labelled_oracle(state):
    """Exact velocity and rates for clips of 5 frames, frame i of value ``1.5 i``, labels hidden by the noise.

    Given v visible frames, every subset of v labels that holds label 0 is as likely as any other; the frames' values
    tell them apart.
    """
    x, t = state.frames.flatten(1)[:, 0].double(), state.times
    velocity, rate = torch.zeros_like(x), torch.zeros_like(x)
    for visible in range(1, LENGTH + 1):
        clips = torch.nonzero(state.clip_frames == visible).flatten()
        if not len(clips):
            continue
        slots = state.cu_frames[clips][:, None] + torch.arange(visible)
        labels = torch.tensor([(0, *rest) for rest in itertools.combinations(range(1, LENGTH), visible - 1)])
        values, spread = SPACING * labels.double(), (1 - t[slots]).clamp(min=1e-6)
        error = (x[slots][:, None] - t[slots][:, None] * values) / spread[:, None]
        posterior = torch.softmax(-0.5 * error.square().sum(dim=2), dim=1)
        velocity[slots] = (posterior @ values - x[slots]) / spread
        rate[slots] = posterior @ (labels.diff(dim=1, append=torch.full((len(labels), 1), LENGTH)) - 1).double()
    return velocity.float()[:, None, None, None], rate


def test_labelled_frames_come_out_in_order_and_each_in_its_place():
    config = SamplerConfig(num_inference_steps=50, num_start_frames=2)
    result = sample(labelled_oracle, frame_shape=(1, 1, 1), batch_size=1000, config=config)
    assert (result.cu_frames.diff() == LENGTH).float().mean() > 0.95
    full = torch.nonzero(result.cu_frames.diff() == LENGTH).flatten()
    frames = torch.stack([result.frames[result.cu_frames[i] : result.cu_frames[i + 1]].flatten() for i in full])
    error = (frames - SPACING * torch.arange(LENGTH)).abs().max(dim=1).values
    assert (error < 0.1).float().mean() > 0.95


def test_the_benchmark_writes_what_it_says(length_law, tmp_path):
    arguments = ["--clips", "300", "--steps", "5", "--laws", FIXED, "--rules", "thinning", "bernoulli"]
    json_path, picture = tmp_path / "a" / "law.json", tmp_path / "law.png"
    assert length_law.main([*arguments, "--json", str(json_path), "--picture", str(picture)]) == 0
    rows = json.loads(json_path.read_text())
    assert [(row["law"], row["rule"], row["num_inference_steps"]) for row in rows] == [
        (FIXED, "thinning", 5),
        (FIXED, "bernoulli", 5),
    ]
    assert rows[0]["total_variation"] == 0
    assert rows[0]["histogram"] == {"19": 1.0}
    assert picture.stat().st_size > 1000
