"""The prior of the global time: marginals, weights, and its inverse."""

import numpy as np
import pytest
import torch

from flowception.flow import (
    ProcessConfig,
    denominators,
    draw_clips,
    effective_sample_ratio,
    expected_counts,
    insertion_loss_sum,
    velocity_loss_sum,
)
from flowception.flow.prior import two_part_prior, two_part_uniform


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_marginals_of_the_two_part_prior(share):
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    time, weight = two_part_prior(u, share)
    assert time.min() >= 0
    assert time.max() < 2
    below = time < 1
    assert below.double().mean().item() == pytest.approx(share, abs=1e-5)
    for part, start in ((time[below], 0.0), (time[~below], 1.0)):
        if len(part):
            assert torch.quantile(part - start, torch.linspace(0, 1, 11).double()).tolist() == pytest.approx(
                [k / 10 for k in range(11)], abs=1e-3
            )
    assert (weight == (1.0 if share == 1 else torch.where(below, 0.5 / share, 0.5 / (1 - share)))).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_importance_weights_keep_the_expectation(share):
    u = (torch.arange(200_000).double() + 0.5) / 200_000
    time, weight = two_part_prior(u, share)
    truth = (torch.arange(200_000).double() + 0.5) / 100_000
    for function in (torch.ones_like, lambda t: t, torch.square, torch.cos):
        assert (weight * function(time)).mean().item() == pytest.approx(function(truth).mean().item(), abs=1e-4)
    ratio = (weight.sum() ** 2 / weight.square().sum() / len(u)).item()
    assert effective_sample_ratio(share) == pytest.approx(ratio, rel=1e-3)


def test_effective_sample_ratio_of_the_design():
    shares = (0.5, 0.8, 0.95, 1.0)
    assert [round(effective_sample_ratio(w), 2) for w in shares] == [1.0, 0.64, 0.19, 1.0]


def test_the_edge_between_the_parts_never_rounds_across():
    edge = torch.tensor([np.nextafter(0.3, 0), 0.3, np.nextafter(1.0, 0)])
    time, _ = two_part_prior(edge, 0.3)
    assert time[0] < 1
    assert time[1] == 1
    assert 1 < time[2] < 2 + 1e-15


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("time", [0.0, 0.25, 0.99, 1.0, 1.75])
def test_the_uniform_leads_to_the_time(share, time):
    uniform = two_part_uniform(torch.tensor([time], dtype=torch.float64), share)
    assert two_part_prior(uniform, share)[0].item() == pytest.approx(time, abs=1e-12)


def test_a_time_that_the_prior_never_gives_has_no_uniform_below_one():
    assert two_part_uniform(torch.tensor([0.3, 1.0, 1.5]), 1.0).tolist() == pytest.approx([0.3, 1.0, 1.5])
    assert (two_part_uniform(torch.tensor([2.0, 3.0]).double(), 0.8) >= 1).all()


LENGTHS, BATCHES, CLIPS = (6, 12), 40, 1500


def expected_losses(insertion_share):
    """Velocity and insertion loss of a fixed model, by the real draws, losses and denominators: means, their errors."""
    config = ProcessConfig(insertion_share=insertion_share, num_start_frames=2, tasks={"t2v": 0.5, "i2v": 0.5})
    generator = torch.Generator().manual_seed(round(1000 * insertion_share))
    found = []
    for _ in range(BATCHES):
        frames = torch.tensor(LENGTHS).repeat(CLIPS // len(LENGTHS))
        u = torch.rand(CLIPS, 2 + 2 * max(LENGTHS), dtype=torch.float64, generator=generator)
        draws = draw_clips(config, frames, u[:, 0], u[:, 1], u[:, 2:].reshape(CLIPS, -1, 2))
        weight = draws.weight[:, None].expand_as(draws.frame_time).flatten()
        error = (1 + draws.shown_time).flatten()[:, None]  # a model that is worse the cleaner a frame is
        velocity = velocity_loss_sum(error, torch.zeros_like(error), draws.flow_mask.flatten(), weight)
        log_rate = (0.5 - draws.global_time.clamp(max=1))[:, None].expand_as(draws.frame_time).flatten()
        insertion = insertion_loss_sum(log_rate, draws.missing.flatten(), draws.insertion_mask.flatten(), weight)
        counts = expected_counts(draws.roles, torch.ones(CLIPS), config.schedule(), config.delay_law)
        divisors = denominators(*counts)
        found.append([float(velocity) / divisors.velocity, float(insertion) / divisors.insertion])
    losses = torch.tensor(found, dtype=torch.float64)
    return losses.mean(dim=0), losses.std(dim=0) / BATCHES**0.5


def test_the_expected_loss_of_a_fixed_model_is_the_same_for_every_share():
    mean, error = expected_losses(0.5)
    for share in (0.8, 0.95):
        other, other_error = expected_losses(share)
        z = (other - mean) / (error**2 + other_error**2).sqrt()
        assert z.abs().max() < 4, f"share {share}: losses {other.tolist()}, at 0.5 {mean.tolist()}"
        assert (other_error / other.abs()).max() < 0.03, "too few clips to tell"


def test_without_the_end_of_the_clock_it_is_another_loss():
    mean, error = expected_losses(0.5)
    other, other_error = expected_losses(1.0)
    assert ((other - mean) / (error**2 + other_error**2).sqrt()).abs().max() > 10
