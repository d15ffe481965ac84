"""Losses against torch.distributions and worked examples; denominators against simulation."""

import math

import pytest
import torch

from flowception.flow import ProcessConfig, draw_clips
from flowception.flow.loss import (
    MAX_LOG_RATE,
    denominators,
    expected_counts,
    insertion_loss_sum,
    rate_from_log,
    velocity_loss_sum,
)


def test_velocity_loss_worked_example():
    velocity = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]])
    target = torch.tensor([[0.0, 0.0], [3.0, 1.0], [0.0, 0.0]])
    loss = velocity_loss_sum(velocity, target, torch.tensor([True, True, False]), torch.tensor([2.0, 0.5, 7.0]))
    assert loss.item() == 2 * (1 + 4) + 0.5 * (9 + 1)


def test_insertion_loss_is_the_poisson_likelihood():
    log_rate = torch.randn(50, dtype=torch.float64)
    missing = torch.randint(0, 9, (50,))
    weight, mask = torch.rand(50, dtype=torch.float64), torch.rand(50) < 0.7
    negative_log = -torch.distributions.Poisson(log_rate.exp()).log_prob(missing.double())
    without_factorial = negative_log - torch.lgamma(missing + 1.0)
    expected = (without_factorial * weight)[mask].sum()
    loss = insertion_loss_sum(log_rate, missing, mask, weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_best_constant_rate_is_the_mean_count():
    missing = torch.tensor([0, 1, 1, 6])
    log_rate = torch.full((4,), math.log(2.0), requires_grad=True)
    insertion_loss_sum(log_rate, missing, torch.ones(4, dtype=torch.bool), torch.ones(4)).backward()
    assert log_rate.grad.sum().item() == pytest.approx(0, abs=1e-6)
    assert log_rate.grad.tolist() == pytest.approx([2, 1, 1, -4], abs=1e-5)


def test_what_is_masked_has_no_effect_even_when_it_is_not_a_number():
    nan = float("nan")
    mask = torch.tensor([True, False])
    velocity = torch.tensor([[1.0], [nan]], requires_grad=True)
    log_rate = torch.tensor([0.0, nan], requires_grad=True)
    weight = torch.tensor([1.0, nan])
    loss = velocity_loss_sum(velocity, torch.tensor([[3.0], [nan]]), mask, weight)
    loss = loss + insertion_loss_sum(log_rate, torch.tensor([2, 5]), mask, weight)
    loss.backward()
    assert loss.item() == 4 + 1
    assert velocity.grad.tolist() == [[-4.0], [0.0]]
    assert log_rate.grad.tolist() == [-1.0, 0.0]


def test_a_rate_beyond_the_clamp_is_finite_and_has_a_gradient():
    log_rate = torch.tensor([200.0], requires_grad=True)
    loss = insertion_loss_sum(log_rate, torch.tensor([3]), torch.tensor([True]), torch.ones(1))
    loss.backward()
    assert torch.isfinite(loss)
    assert log_rate.grad.item() == pytest.approx(math.exp(MAX_LOG_RATE) - 3, rel=1e-5)
    assert rate_from_log(torch.tensor([200.0])).item() == pytest.approx(math.exp(MAX_LOG_RATE))
    assert rate_from_log(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32


CASES = [
    {},
    {"tasks": {"i2v": 1.0}},
    {"tasks": {"t2v": 1.0, "i2v": 3.0}, "insertion_share": 0.8},
    {"insertion_schedule": "power", "insertion_share": 0.3},
    {"insertion_schedule": "cosine", "num_start_frames": 1},
    {"delay_law": "full_sequence", "tasks": {"t2v": 1.0, "i2v": 1.0, "completion": 1.0}},
    {"tasks": {"v2v": 1.0}, "insertion_share": 0.7},
    {"tasks": {"interpolation": 1.0}, "insertion_schedule": "cosine"},
    {"tasks": {"completion": 1.0}, "num_start_frames": 0},
    {"delay_law": "autoregressive", "tasks": {"t2v": 1.0, "v2v": 1.0, "completion": 1.0}},
    {"delay_law": "left_to_right", "tasks": {"t2v": 1.0, "i2v": 1.0}, "insertion_share": 0.8},
    {"delay_law": "hierarchical", "insertion_schedule": "cosine"},
    {"delay_law": "random", "insertion_share": 0.3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_denominators_are_the_expected_weighted_counts(case):
    config, clips = ProcessConfig(**case), 100_000
    generator = torch.Generator().manual_seed(0)

    def uniforms(*shape):
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    num_frames = torch.randint(1, 12, (clips,), generator=generator)
    elements = 4.0 * torch.randint(1, 4, (clips,), generator=generator)
    u_time = (torch.randperm(clips, generator=generator) + uniforms(clips)) / clips
    draws = draw_clips(config, num_frames, u_time, uniforms(clips), uniforms(clips, 12, 2))
    velocity = (draws.weight * draws.flow_mask.sum(dim=1) * elements).sum().item()
    sites = (draws.weight * draws.insertion_mask.sum(dim=1)).sum().item()
    expected = denominators(*expected_counts(draws.roles, elements, config.schedule(), config.delay_law))
    assert velocity == pytest.approx(expected.velocity, rel=0.01)
    assert sites == pytest.approx(expected.insertion if draws.inserts else 0.0, rel=0.01)


def test_denominators_worked_example():
    # i2v of 5 frames: active context, 3 starts, 1 free; t2v of 2 frames: 2 starts.
    roles = torch.tensor([[2, 0, 1, 0, 0], [0, 0, -1, -1, -1]])
    schedule = ProcessConfig(insertion_schedule="power", insertion_exponent=3.0).schedule()
    velocity, sites = expected_counts(roles, torch.tensor([10, 100]), schedule)
    assert velocity.tolist() == [4 / 2 * 10, 2 / 2 * 100]
    assert sites.tolist() == [(1 + 3 + 0.25) / 2, 1.0]
    assert denominators(velocity, sites) == (120.0, 3.125)


def test_a_batch_that_cannot_have_a_term_divides_by_one():
    roles = torch.tensor([[0, 0, 0]])
    full = expected_counts(roles, torch.tensor([7]), ProcessConfig().schedule(), "full_sequence")
    assert denominators(*full) == (21.0, 1.0)
    empty = expected_counts(torch.empty(0, 3, dtype=torch.int64), torch.empty(0), ProcessConfig().schedule())
    assert denominators(*empty) == (1.0, 1.0)
