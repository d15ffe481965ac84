"""Compare the oracle, the real training targets and the real sampler on clips with a fully known law.

Targets: with f the oracle and y a target, f is the conditional mean if ``E[(y - f(x)) g(x)] = 0`` for every function g
of the visible state. This is tested for several g, as z-scores, and the mean square of ``y - f(x)`` is compared with
that of the law (``test_the_posterior_by_brute_force`` tests f itself).
"""

import itertools
import math

import pytest
import torch

from flowception.evaluation.frechet import sample_frechet_distance, sampling_frechet_distance
from flowception.evaluation.oracles.gaussian import GaussianClips, GaussianOracle, GivenFrames
from flowception.flow import (
    Context,
    ProcessConfig,
    Role,
    SamplerConfig,
    draw_clips,
    interpolate,
    is_context,
    sample,
    velocity_target,
)
from flowception.flow.schedule import CosineSchedule, LinearSchedule

ACTIVE, PASSIVE, START = int(Role.CONTEXT_ACTIVE), int(Role.CONTEXT_PASSIVE), int(Role.START)
TWO_OR_FIVE = GaussianClips(lengths={2: 0.5, 5: 0.5}, correlation=0.8)
LABELED = GaussianClips(lengths={5: 1.0}, correlation=0.5, slope=1.5, num_start_frames=2)


def image(num_frames):
    return [GivenFrames(positions=(0,), active=(True,))]


def first_two(num_frames):
    return [GivenFrames(positions=(0, 1), active=(False, True))]


def keyframes(num_frames):
    """Frame 0, the last frame, and one between; the last is active too, although nothing is missing right of it."""
    others = range(1, num_frames - 1)
    return [
        GivenFrames(positions=(0, k, num_frames - 1), active=(True,) * 3, probability=1 / len(others)) for k in others
    ]


def test_the_posterior_by_brute_force():
    """One visible generated frame at clock t in clips of 1 or 2 frames: two hypotheses, by hand."""
    law = GaussianClips(lengths={1: 0.3, 2: 0.7}, correlation=0.6, slope=2.0)
    oracle = GaussianOracle(law, LinearSchedule())
    t = 0.4
    velocity, rate = oracle.predict(
        torch.tensor([[0.7]], dtype=torch.float64),
        torch.tensor([t], dtype=torch.float64),
        torch.tensor([START]),
        torch.tensor([0, 1]),
        torch.tensor([t], dtype=torch.float64),
    )
    assert rate.item() == pytest.approx(0.7 * (1 - t) / (0.3 + 0.7 * (1 - t)), rel=1e-9)
    variance = t**2 + (1 - t) ** 2
    assert velocity.item() == pytest.approx((t - (1 - t)) / variance * 0.7, rel=1e-9)


def test_the_position_of_a_labeled_frame_by_bayes():
    """Two frames of a clip of three, the second at 1 or 2 with means 3 and 6: densities by torch.distributions."""
    law = GaussianClips(lengths={3: 1.0}, correlation=0.5, slope=3.0)
    times, seen = torch.tensor([0.5, 0.3]).double(), torch.tensor([0.2, 1.4]).double()
    density = []
    for place in (1, 2):
        cross = 0.5**place * times.prod()
        own = times.square() + (1 - times).square()
        covariance = torch.stack([torch.stack([own[0], cross]), torch.stack([cross, own[1]])])
        mean = times * torch.tensor([0.0, 3.0 * place]).double()
        density.append(torch.distributions.MultivariateNormal(mean, covariance).log_prob(seen).exp().item())
    first_gap = density[1] / sum(density)
    _, rate = GaussianOracle(law, LinearSchedule()).predict(
        seen[:, None], times, torch.tensor([START, START]), torch.tensor([0, 2]), torch.tensor([0.5])
    )
    assert rate.tolist() == pytest.approx([first_gap, 1 - first_gap], rel=1e-9)


CASES = {
    "text to video": (TWO_OR_FIVE, {"num_start_frames": 1}),
    "labeled": (LABELED, {"num_start_frames": 2, "insertion_schedule": "cosine", "time_shift": 3.0}),
    "image to video": (
        GaussianClips(lengths={2: 0.3, 3: 0.3, 5: 0.4}, correlation=-0.5, slope=0.5, context=image, num_start_frames=0),
        {"num_start_frames": 0, "tasks": {"i2v": 1.0}, "insertion_schedule": "power"},
    ),
    "image to video, one start frame": (
        GaussianClips(lengths={4: 0.5, 6: 0.5}, correlation=0.7, slope=0.5, context=image, num_start_frames=1),
        {"num_start_frames": 1, "tasks": {"i2v": 1.0}, "insertion_share": 0.8},
    ),
}


def draw_states(law, config, clips, seed=0):
    """Real draws of the process on clips of the law: visible state and targets, flat over visible frames."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(list(law.lengths))
    chosen = torch.multinomial(torch.tensor(list(law.lengths.values())), clips, replacement=True, generator=generator)
    num_frames, longest = lengths[chosen], int(lengths.max())
    u = torch.rand(clips, 2 + 2 * longest, dtype=torch.float64, generator=generator)
    draws = draw_clips(config, num_frames, u[:, 0], u[:, 1], u[:, 2:].view(clips, longest, 2))
    x_1 = torch.zeros(clips, longest, dtype=torch.float64)
    for length in law.lengths:
        rows = torch.nonzero(num_frames == length).flatten()
        x_1[rows, :length] = law.draw(length, len(rows), generator)
    x_0 = torch.randn(clips, longest, dtype=torch.float64, generator=generator)
    x_t = torch.where(is_context(draws.roles), x_1, interpolate(x_0, x_1, draws.shown_time.clamp(0, 1)))
    cu_frames = torch.cat([torch.zeros(1, dtype=torch.int64), draws.visible_frames.cumsum(0)])
    see = draws.visible
    seen = (x_t[see][:, None], draws.shown_time[see], draws.roles[see], cu_frames, draws.global_time)
    return draws, seen, velocity_target(x_0, x_1)[see]


def largest_z(residual, x, f, times, weight):
    """Largest z-score of the mean of ``residual * g`` over functions g of the visible state."""
    features = [torch.ones_like(x), x, x.square(), f, times, x * times, torch.sin(3 * x)]
    products = torch.stack([weight * residual * g for g in features])
    return (products.mean(dim=1) / products.std(dim=1) * math.sqrt(len(x))).abs().max().item()


@pytest.mark.parametrize("case", list(CASES))
def test_the_oracle_is_the_conditional_mean_of_the_real_targets(case):
    law, options = CASES[case]
    config = ProcessConfig(**options)
    oracle = GaussianOracle(law, config.schedule())
    draws, seen, target = draw_states(law, config, 40_000)
    velocity, rate = oracle.predict(*seen)
    see = draws.visible
    x, times, f = seen[0][:, 0], seen[1], velocity[:, 0]
    weight = draws.weight[:, None].expand_as(see)[see]
    flow, sites = draws.flow_mask[see], draws.insertion_mask[see]
    missing = draws.missing[see].double()
    assert largest_z((target - f)[flow], x[flow], f[flow], times[flow], weight[flow]) < 4.5
    assert largest_z((missing - rate)[sites], x[sites], rate[sites], times[sites], weight[sites]) < 4.5
    # Neither is trivial: the oracle explains a substantial part of the variance.
    assert (target - f)[flow].square().mean() < 0.75 * target[flow].var()
    assert (missing - rate)[sites].square().mean() < 0.9 * missing[sites].var()


def clips_of(result, length):
    lengths = result.cu_frames.diff()
    which = torch.nonzero(lengths == length).flatten()
    slots = result.cu_frames[which][:, None] + torch.arange(length)
    return result.frames.flatten()[slots].double(), len(which) / len(lengths)


def assert_law(result, law, factor=3.0, slack=0.005):
    """Length law and Fréchet distance of each length's joint law, relative to the noise floor."""
    other = 1.0
    for length, share in law.lengths.items():
        frames, seen_share = clips_of(result, length)
        assert seen_share == pytest.approx(share, abs=0.03 + 2.5 * math.sqrt(share * (1 - share) / len(result.capped)))
        other -= seen_share
        mean, covariance = law.mean(length), law.covariance(length)
        distance = sample_frechet_distance(frames, mean, covariance)
        floor = sampling_frechet_distance(covariance, len(frames))
        assert distance <= factor * floor + slack, f"{length} frames: {distance:.4f}, floor {floor:.4f}"
    assert other <= 0.02


@pytest.mark.parametrize(
    ("num_steps", "clips", "slack"), [(50, 1500, 0.01), pytest.param(200, 6000, 0.005, marks=pytest.mark.long)]
)
def test_the_sampler_reproduces_the_joint_law_of_each_length(num_steps, clips, slack):
    config = SamplerConfig(num_inference_steps=num_steps, num_start_frames=1)
    result = sample(
        GaussianOracle(TWO_OR_FIVE, LinearSchedule()), frame_shape=(1, 1, 1), batch_size=clips, config=config
    )
    assert_law(result, TWO_OR_FIVE, slack=slack)


def test_labeled_frames_are_in_order_with_a_shifted_time_and_another_schedule():
    config = SamplerConfig(num_inference_steps=50, num_start_frames=2, insertion_schedule="cosine", time_shift=3.0)
    result = sample(GaussianOracle(LABELED, CosineSchedule()), frame_shape=(1, 1, 1), batch_size=1000, config=config)
    assert_law(result, LABELED, slack=0.03)


CONTEXTS = {
    "image": (image, 1, 1.5),
    "first two, the first passive": (first_two, 1, 1.5),
    "keyframes": (keyframes, 0, 6),
}
"""Law of the context, start frames, and slope; with slope 6 the value of a keyframe reveals its position."""


@pytest.mark.parametrize("name", list(CONTEXTS))
def test_labeled_frames_are_inserted_in_the_correct_gap_of_a_context(name):
    """With context from true clips, context and generated frames jointly follow the law of clips."""
    context, starts, slope = CONTEXTS[name]
    law = GaussianClips(lengths={5: 1.0}, correlation=0.5, slope=slope, context=context, num_start_frames=starts)
    clips = 900
    truth = law.draw(5, clips, torch.Generator().manual_seed(0))
    options = context(5)
    given = [options[clip % len(options)] for clip in range(clips)]
    contexts = [
        Context(frames=row[list(g.positions), None, None, None].float(), active=g.active, num_start_frames=starts)
        for row, g in zip(truth, given, strict=True)
    ]
    result = sample(
        GaussianOracle(law, LinearSchedule()),
        frame_shape=(1, 1, 1),
        batch_size=clips,
        config=SamplerConfig(num_inference_steps=50),
        context=contexts,
    )
    assert_law(result, law, slack=0.03)
    # Each context frame is unchanged at its original position, so every gap has the correct number of frames.
    of_five = torch.nonzero(result.cu_frames.diff() == 5).flatten().tolist()
    right = [
        torch.nonzero(is_context(result.roles[result.cu_frames[i] : result.cu_frames[i + 1]])).flatten().tolist()
        == list(given[i].positions)
        for i in of_five
    ]
    assert sum(right) / len(right) > 0.97
    kept = result.frames[is_context(result.roles)].flatten()
    assert torch.equal(kept, torch.cat([c.frames.flatten() for c in contexts]))


def test_elements_of_a_frame_are_independent_copies():
    oracle = GaussianOracle(TWO_OR_FIVE, LinearSchedule())
    generator = torch.Generator().manual_seed(0)
    x, times = torch.randn(3, 2, 1, 1, generator=generator), torch.tensor([0.6, 0.2, 0.4])
    cu_frames, clock, roles = torch.tensor([0, 3]), torch.tensor([0.6]), torch.tensor([START] * 3)
    both, _ = oracle.predict(x, times, roles, cu_frames, clock)
    # With known positions, elements carry no information about each other.
    fixed = GaussianOracle(GaussianClips(lengths={3: 1.0}, correlation=0.8), LinearSchedule())
    whole, rate = fixed.predict(x, times, roles, cu_frames, torch.ones(1))
    one, _ = fixed.predict(x[:, 1:], times, roles, cu_frames, torch.ones(1))
    torch.testing.assert_close(whole[:, 1:], one)
    assert rate.tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    assert not torch.allclose(both, whole, atol=1e-3)


def test_nothing_is_missing_beyond_the_longest_clip():
    law = GaussianClips(lengths={2: 1.0}, correlation=0.0)
    velocity, rate = GaussianOracle(law, LinearSchedule()).predict(
        torch.zeros(3, 1), torch.full((3,), 0.5), torch.tensor([START] * 3), torch.tensor([0, 3]), torch.tensor([0.5])
    )
    assert torch.isfinite(velocity).all()
    assert rate.tolist() == [0, 0, 0]


def test_every_subset_is_a_hypothesis():
    oracle = GaussianOracle(TWO_OR_FIVE, LinearSchedule())
    known = oracle._enumerate((START, START))
    subsets = [(0, 1), *((0, i) for i in range(1, 5))]
    assert sorted(map(tuple, known.positions.tolist())) == sorted(subsets)
    with_context = GaussianOracle(
        GaussianClips(lengths={5: 1.0}, correlation=0.0, context=keyframes, num_start_frames=0), LinearSchedule()
    )._enumerate((ACTIVE, START, ACTIVE, ACTIVE))
    expected = [(0, i, k, 4) for k, i in itertools.product((1, 2, 3), repeat=2) if i < k]
    assert sorted(map(tuple, with_context.positions.tolist())) == sorted(expected)
