"""Extended time: the two-part prior, visibility and missing counts, and their cost."""

import math

import numpy as np
import pytest
import torch

from flowception import rng
from flowception.errors import ConfigError
from flowception.flow import ProcessConfig, Role, draw_clips, expected_attention_ratio
from flowception.flow.delays import DELAY_LAWS
from flowception.flow.extended_time import ClipDraws

A, S, F = Role.ABSENT, Role.START, Role.FREE
ACTIVE, PASSIVE = Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE
INF = math.inf


def uniform_draws(config, num_frames, seed=0):
    clips, longest = len(num_frames), int(max(num_frames))
    u_time = (rng.permutation(seed, rng.Stream.ORDER, clips) + 0.5) / clips
    clip = np.arange(clips)
    u_task = rng.uniforms(seed, rng.Stream.TASK, clip=clip)[:, 0]
    u_frame = rng.uniforms(seed, rng.Stream.FRAME, clip=clip[:, None], frame=np.arange(longest))
    return draw_clips(config, np.asarray(num_frames), u_time, u_task, u_frame)


def attention_ratio(draws, tokens_per_frame=1):
    return ((draws.visible_frames * tokens_per_frame) ** 2).sum() / ((draws.num_frames * tokens_per_frame) ** 2).sum()


@pytest.fixture
def five_frames():
    """Three clips, the last shorter: before the clock's end, after it, and one with all kinds of context."""
    return ClipDraws(
        num_frames=torch.tensor([5, 5, 4]),
        global_time=torch.tensor([0.6, 1.3, 0.5]).double(),
        weight=torch.ones(3).double(),
        task=torch.zeros(3, dtype=torch.int64),
        roles=torch.tensor([[S, F, F, S, F], [S, F, F, F, F], [PASSIVE, ACTIVE, F, S, A]]),
        delay=torch.tensor([[0, 0.7, 0.5, 0, 0.8], [0, 0.9, 0.2, 0.5, 0.25], [0, 0, 0.6, 0, INF]]).double(),
        time_shift=3.0,
        inserts=True,
    )


def test_five_frames_worked_example(five_frames):
    draws = five_frames
    assert draws.visible.tolist() == [
        [True, False, True, True, False],
        [True, True, True, True, True],
        [True, True, False, True, False],
    ]
    assert draws.visible_frames.tolist() == [3, 5, 3]
    assert draws.missing.tolist() == [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert draws.flow_mask.tolist() == [
        [True, False, True, True, False],
        [False, True, False, True, False],
        [False, False, False, True, False],
    ]
    assert draws.insertion_mask.tolist() == [
        [True, False, True, True, False],
        [False] * 5,
        [False, True, False, True, False],
    ]


def test_shown_time_is_the_shifted_own_time_and_the_plain_clock_for_context(five_frames):
    def shifted(t):
        return t / (t + 3 * (1 - t))

    first, second, third = five_frames.shown_time.tolist()
    assert first == pytest.approx([shifted(0.6), 0, shifted(0.1), shifted(0.6), 0])
    assert second == pytest.approx([1, shifted(0.4), 1, shifted(0.8), 1])
    assert third[:2] == [0.5, 0.5]
    assert third[3] == pytest.approx(shifted(0.5))


def test_missing_counts_are_those_of_a_plain_loop():
    draws = uniform_draws(ProcessConfig(tasks={"t2v": 1, "i2v": 1}, num_start_frames=2), [1, 2, 5, 9, 12] * 60)
    for b in range(300):
        n = int(draws.num_frames[b])
        for i in range(draws.roles.shape[1]):
            count = 0
            if draws.visible[b, i]:
                while i + count + 1 < n and not draws.visible[b, i + count + 1]:
                    count += 1
            assert draws.missing[b, i] == count
        assert draws.missing[b].sum() + draws.visible_frames[b] == n


@pytest.mark.parametrize("name", ["linear", "power", "cosine"])
def test_a_free_frame_is_visible_with_probability_kappa(name):
    config = ProcessConfig(insertion_schedule=name, insertion_share=1.0, num_start_frames=1)
    draws = uniform_draws(config, [9] * 50_000)
    free = draws.roles == Role.FREE
    for low in (0.0, 0.25, 0.5, 0.75):
        rows = (draws.global_time >= low) & (draws.global_time < low + 0.25)
        share = draws.visible[rows][free[rows]].double().mean().item()
        assert share == pytest.approx(config.schedule().kappa(draws.global_time[rows]).mean().item(), abs=0.01)
    assert draws.visible[:, 0].all()


def test_tasks_are_drawn_with_their_probabilities():
    draws = uniform_draws(ProcessConfig(tasks={"i2v": 3.0, "t2v": 1.0}), [4] * 20_000)
    assert draws.task.double().mean().item() == pytest.approx(0.75, abs=0.02)
    assert ((draws.roles[:, 0] == ACTIVE) == (draws.task == 1)).all()
    lone = uniform_draws(ProcessConfig(tasks={"i2v": 1.0}), [1, 1, 3])
    assert lone.task.tolist() == [0, 0, 1]


@pytest.mark.parametrize("law", DELAY_LAWS)
@pytest.mark.parametrize("name", ["linear", "power", "cosine"])
def test_a_clip_is_drawn_the_same_whatever_else_is_drawn(name, law):
    tasks = {"t2v": 1, "i2v": 1, "v2v": 1, "interpolation": 1, "completion": 1}
    config = ProcessConfig(tasks=tasks, insertion_schedule=name, insertion_exponent=1.7, delay_law=law)
    clips = 501
    num_frames = 1 + np.arange(clips) % 13
    u_time, u_task = rng.uniforms(1, rng.Stream.TASK, clip=np.arange(clips)).T
    u_frame = rng.uniforms(1, rng.Stream.FRAME, clip=np.arange(clips)[:, None], frame=np.arange(13))
    whole = draw_clips(config, num_frames, u_time, u_task, u_frame)
    for rows in (np.array([3]), np.array([500, 7, 12, 77, 13]), np.arange(0, clips, 3)):
        part = draw_clips(config, num_frames[rows], u_time[rows], u_task[rows], u_frame[rows])
        for name_of in ("global_time", "weight", "task", "roles", "delay", "visible", "missing", "shown_time"):
            assert torch.equal(getattr(part, name_of), getattr(whole, name_of)[rows]), name_of


def test_full_sequence_shows_every_frame_at_one_time():
    draws = uniform_draws(ProcessConfig(delay_law="full_sequence", insertion_share=0.8), [3, 7, 5, 1] * 500)
    inside = draws.roles != Role.ABSENT
    assert torch.equal(draws.visible, inside)
    assert torch.equal(draws.flow_mask, inside)
    assert not draws.insertion_mask.any()
    assert (draws.missing == 0).all()
    assert (draws.weight == 1).all()
    assert draws.global_time.max() < 1
    assert draws.global_time.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (draws.frame_time[inside] == draws.global_time[:, None].expand_as(inside)[inside]).all()


RATIO_CASES = [
    {},
    {"insertion_share": 1.0},
    {"insertion_share": 0.8, "insertion_schedule": "cosine", "tasks": {"t2v": 1, "i2v": 2}},
    {"insertion_schedule": "power", "insertion_exponent": 3.0, "num_start_frames": 1},
    {"delay_law": "full_sequence"},
    {"tasks": {"v2v": 1}, "num_start_frames": 2, "max_context_frames": 5, "insertion_share": 1.0},
    {"tasks": {"interpolation": 1}, "insertion_share": 1.0, "insertion_schedule": "cosine"},
    {"tasks": {"completion": 1}, "insertion_share": 1.0},
    {"tasks": {"t2v": 1, "i2v": 1, "v2v": 1, "interpolation": 1, "completion": 1}, "insertion_share": 0.8},
    {
        "delay_law": "autoregressive",
        "tasks": {"t2v": 1, "i2v": 2, "v2v": 1, "interpolation": 1, "completion": 2},
        "insertion_share": 0.8,
    },
    {"delay_law": "left_to_right", "insertion_schedule": "power", "tasks": {"t2v": 1, "i2v": 2}},
    {"delay_law": "hierarchical", "insertion_share": 0.8, "tasks": {"v2v": 1, "completion": 1}},
    {"delay_law": "random", "insertion_schedule": "cosine", "insertion_share": 1.0},
]


@pytest.mark.parametrize("case", RATIO_CASES, ids=str)
def test_expected_attention_ratio_is_that_of_a_simulation(case):
    config = ProcessConfig(**case)
    num_frames = [2, 6, 11, 19] * 10_000
    expected = expected_attention_ratio(config, np.array(num_frames))
    assert attention_ratio(uniform_draws(config, num_frames)).item() == pytest.approx(expected, rel=0.01)
    assert expected_attention_ratio(config, {2: 1, 6: 1, 11: 1, 19: 1}) == pytest.approx(expected)


def test_expected_attention_ratio_of_mixed_frame_sizes():
    # Short clips of large frames weigh more than their lengths say, and more of them is visible.
    config, num_frames, tokens = ProcessConfig(insertion_share=1.0), [4, 19] * 20_000, torch.tensor([65, 17] * 20_000)
    expected = expected_attention_ratio(config, np.array(num_frames), tokens)
    assert attention_ratio(uniform_draws(config, num_frames), tokens).item() == pytest.approx(expected, rel=0.01)
    short, long = (expected_attention_ratio(config, np.array([n])) for n in (4, 19))
    pairs = (4 * 65) ** 2, (19 * 17) ** 2
    assert expected == pytest.approx((short * pairs[0] + long * pairs[1]) / sum(pairs))
    assert expected_attention_ratio(config, np.array(num_frames), np.full(40_000, 9)) == pytest.approx(
        expected_attention_ratio(config, np.array(num_frames))
    )
    with pytest.raises(ValueError, match="length of each clip"):
        expected_attention_ratio(config, {4: 1}, np.array([17]))


def test_attention_ratios_of_the_design():
    frames = np.array([19])
    assert expected_attention_ratio(ProcessConfig(insertion_share=1.0), frames) == pytest.approx(0.40, abs=0.005)
    assert expected_attention_ratio(ProcessConfig(), frames) == pytest.approx(0.70, abs=0.005)
    long_clip, lone_start = np.array([100_000]), {"num_start_frames": 1}
    assert expected_attention_ratio(ProcessConfig(insertion_share=1.0, **lone_start), long_clip) == pytest.approx(
        1 / 3, abs=1e-4
    )
    assert expected_attention_ratio(ProcessConfig(**lone_start), long_clip) == pytest.approx(2 / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"insertion_share": 0.0}, r"insertion_share must be a number in \(0, 1\], got 0\.0"),
        ({"insertion_share": 1.5}, r"insertion_share must be .*, got 1\.5"),
        ({"time_shift": 0.5}, r"time_shift must be a number >= 1, got 0\.5"),
        ({"num_start_frames": -1}, "num_start_frames must be an integer >= 0, got -1"),
        ({"max_cuts": 0}, "max_cuts must be an integer >= 1, got 0"),
        ({"condition_dropout": 2.0}, r"condition_dropout must be a number in \[0, 1\], got 2\.0"),
        ({"delay_law": "late"}, "delay_law must be one of .*, got 'late'"),
        ({"insertion_schedule": "late"}, "insertion_schedule must be one of .*, got 'late'"),
        ({"tasks": {"t2x": 1.0}}, "task must be one of .*, got 't2x'"),
        ({"tasks": {"t2v": -1.0}}, r"tasks.t2v must be a number >= 0, got -1\.0"),
        ({"tasks": {"t2v": 0.0}}, r"tasks must contain a probability > 0, got {'t2v': 0\.0}"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ProcessConfig(**wrong)


def test_inconsistent_shapes_are_rejected():
    one = np.zeros(1)
    with pytest.raises(ValueError, match=r"\[B, N, 2\]"):
        draw_clips(ProcessConfig(), np.array([3]), one, one, np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"num_frames must be in \[1, 3\]"):
        draw_clips(ProcessConfig(), np.array([4]), one, one, np.zeros((1, 3, 2)))
    with pytest.raises(ValueError, match="got values from 0 to 0"):
        draw_clips(ProcessConfig(), np.array([0]), one, one, np.zeros((1, 3, 2)))
