"""Delay laws: which frames get which delays, in which order, and what stays unchanged."""

import numpy as np
import pytest
import torch

from flowception.errors import ConfigError
from flowception.flow import ProcessConfig, Role, build_schedule, draw_clips
from flowception.flow.delays import DELAY_LAWS, PRESCRIBED_LAWS, Hierarchical, build_delay_law

S, F, A = int(Role.START), int(Role.FREE), int(Role.ABSENT)
ACTIVE, PASSIVE = int(Role.CONTEXT_ACTIVE), int(Role.CONTEXT_PASSIVE)
SHUFFLED = ["random", "left_to_right", "hierarchical"]
ROLES = torch.tensor([[S, F, F, S, F, F, F, F, F], [ACTIVE, F, S, F, F, A, A, A, A], [S, F, F, F, ACTIVE, F, F, S, A]])


def uniforms(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def delays_of(name, roles=ROLES, seed=0, schedule="cosine"):
    law = build_delay_law(name)
    adapted = law.adapt_roles(roles)
    return adapted, law.delays(adapted, uniforms(*roles.shape, seed=seed), build_schedule(schedule))


@pytest.mark.parametrize("name", DELAY_LAWS)
def test_every_law_keeps_context_and_length_and_shows_a_first_frame(name):
    roles, delay = delays_of(name)
    context = (ROLES == ACTIVE) | (ROLES == PASSIVE)
    assert torch.equal(roles[context], ROLES[context])
    assert torch.equal(roles == A, ROLES == A)
    assert torch.equal(delay == torch.inf, ROLES == A)
    assert (delay[context] == 0).all()
    assert (delay[:, 0] == 0).all()
    assert (delay[roles == S] == 0).all()


@pytest.mark.parametrize("name", SHUFFLED)
def test_a_prescribed_order_reassigns_the_delays_of_the_uniform_law(name):
    roles, delay = delays_of(name)
    assert torch.equal((roles == S).sum(dim=1), (ROLES == S).sum(dim=1))
    for row in range(len(roles)):
        own = build_schedule("cosine").inverse(uniforms(*roles.shape)[row][roles[row] == F])
        assert delay[row][roles[row] == F].sort().values.tolist() == own.sort().values.tolist()


def test_left_to_right_worked_example():
    roles, delay = delays_of("left_to_right")
    assert roles.tolist() == [
        [S, S, F, F, F, F, F, F, F],
        [ACTIVE, S, F, F, F, A, A, A, A],
        [S, S, F, F, ACTIVE, F, F, F, A],
    ]
    for row in range(3):
        free = delay[row][roles[row] == F]
        assert (free.diff() > 0).all()


def test_hierarchical_order_worked_example():
    assert Hierarchical().place_in_order(torch.arange(13)).tolist() == [-64, 0, -1, 0, -2, 0, -1, 0, -3, 0, -1, 0, -2]
    roles, _ = delays_of("hierarchical")
    assert roles.tolist() == [
        [S, F, F, F, F, F, F, F, S],
        [ACTIVE, F, F, F, S, A, A, A, A],
        [S, F, S, F, ACTIVE, F, F, F, A],
    ]
    lone = torch.tensor([[S] + [F] * 12])
    for seed in range(20):
        delay = delays_of("hierarchical", lone, seed)[1][0]
        levels = [delay[[8]], delay[[4, 12]], delay[[2, 6, 10]], delay[1::2]]
        for coarse, fine in zip(levels, levels[1:]):
            assert coarse.max() < fine.min()


def test_frames_of_one_level_come_in_any_order():
    roles, clips = torch.tensor([[S] + [F] * 8] * 20_000), 20_000
    _, delay = delays_of("hierarchical", roles)
    odd = delay[:, 1::2]
    first = torch.bincount(odd.argmin(dim=1), minlength=4) / clips
    assert first.tolist() == pytest.approx([0.25] * 4, abs=0.02)
    # The order of a level says nothing of when its first frame comes: k-th least of 8 uniforms has the mean k / 9.
    _, linear = delays_of("hierarchical", roles, schedule="linear")
    least, where = linear[:, 1::2].min(dim=1)
    for frame in range(4):
        assert least[where == frame].mean().item() == pytest.approx(5 / 9, abs=0.01)


def test_autoregression_is_one_frame_after_another():
    roles, delay = delays_of("autoregressive")
    assert roles.tolist() == [[S] + [F] * 8, [ACTIVE, S, F, F, F, A, A, A, A], [S, F, F, F, ACTIVE, F, F, F, A]]
    inf = torch.inf
    assert delay.tolist() == [
        list(range(9)), [0, 0, 1, 2, 3, inf, inf, inf, inf], [0, 1, 2, 3, 0, 4, 5, 6, inf],
    ]  # fmt: skip
    law = build_delay_law("autoregressive")
    assert law.clock_end(roles).tolist() == [9, 4, 7]


def test_autoregression_has_one_frame_in_flow_and_all_before_it_finished():
    config = ProcessConfig(delay_law="autoregressive", tasks={"t2v": 1, "i2v": 1}, insertion_share=0.8)
    num_frames = np.array([2, 5, 7, 1] * 1000)
    draws = draw_clips(config, num_frames, uniforms(4000, seed=1), uniforms(4000, seed=2), uniforms(4000, 7, 2))
    assert (draws.flow_mask.sum(dim=1) == 1).all()
    assert not draws.insertion_mask.any()
    assert (draws.weight == 1).all()
    here = draws.flow_mask.double().argmax(dim=1)
    assert torch.equal(draws.visible_frames, here + 1)
    own = draws.frame_time.gather(1, here[:, None]).flatten()
    assert own.mean().item() == pytest.approx(0.5, abs=0.02)
    generated = num_frames - (draws.task.numpy() == 1)
    share = torch.from_numpy(draws.global_time.numpy() / generated)
    assert torch.quantile(share, torch.linspace(0, 1, 5).double()).tolist() == pytest.approx(
        [0, 0.25, 0.5, 0.75, 1], abs=0.03
    )
    # The clock that context is shown stops at 1.
    context = draws.roles == ACTIVE
    assert torch.equal(draws.shown_time[context], draws.global_time.clamp(max=1)[context.any(dim=1)])


@pytest.mark.parametrize("name", SHUFFLED)
@pytest.mark.parametrize("schedule", ["linear", "power", "cosine"])
def test_visible_frames_are_as_many_as_under_the_uniform_law(name, schedule):
    """Present frames and a binomial number of free ones: mean and variance at a fixed time, in closed form."""
    clips, n, starts = 40_000, 11, 3
    config = ProcessConfig(delay_law=name, insertion_schedule=schedule, num_start_frames=starts, insertion_share=0.5)
    for time in (0.2, 0.6, 0.9):
        u_time = torch.full((clips,), time / 2)
        draws = draw_clips(config, np.full(clips, n), u_time, uniforms(clips, seed=3), uniforms(clips, n, 2))
        kappa = config.schedule().kappa(torch.tensor(time).double()).item()
        visible, free = draws.visible_frames.double(), n - starts
        assert visible.mean().item() == pytest.approx(starts + free * kappa, rel=0.01)
        assert visible.var().item() == pytest.approx(free * kappa * (1 - kappa), rel=0.05)


def test_only_uniform_is_learned():
    assert set(PRESCRIBED_LAWS) == set(DELAY_LAWS) - {"uniform"}
    with pytest.raises(
        ConfigError, match="delay_law must be one of uniform, full_sequence, autoregressive.*, got 'late'"
    ):
        build_delay_law("late")
