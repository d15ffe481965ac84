"""Both training losses as weighted sums, and the counts they are divided by.

A micro-step's loss is ``S_v / N_v + insertion_loss_weight * S_i / N_i``. ``S`` are the sums below; ``N`` are the
counts that the step's clips have in expectation over ``tau_g ~ U(0, 2)`` and the delays, known from the roles alone.
So they are the same on every rank and need no communication (DESIGN.md section 2, "Losses").

Shape legend: ``T`` tokens of a pack, ``C`` channels, ``F`` frame slots, ``B`` clips, ``N`` frames of the longest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception.flow.delays import DelayLaw, build_delay_law
from flowception.flow.schedule import InsertionSchedule
from flowception.flow.task import Role, is_generated

MIN_LOG_RATE = -12.0
MAX_LOG_RATE = 9.0
"""Rates stay between 6e-6 and 8,103 missing frames."""


def rate_from_log(log_rate: Tensor) -> Tensor:
    """The insertion rate: expected number of frames missing to the right of a frame.

    Args:
        log_rate: The rate head's output, any shape.

    Returns:
        ``exp(log_rate)`` in float32 at least, exponent clamped.
    """
    log_rate = log_rate if log_rate.dtype == torch.float64 else log_rate.float()
    return torch.exp(log_rate.clamp(MIN_LOG_RATE, MAX_LOG_RATE))


def velocity_loss_sum(velocity: Tensor, target: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error, summed over the tokens that ``mask`` keeps and their channels.

    Args:
        velocity: [T, C], the model's.
        target: [T, C], ``x_1 - x_0``.
        mask: bool [T], tokens of generated frames in flow state. What lies elsewhere, even NaN, has no effect.
        weight: [T], the clip's importance weight.

    Returns:
        float32 scalar.
    """
    error = torch.where(mask[:, None], velocity.float() - target.float(), 0.0)
    return (error.square().sum(dim=1) * torch.where(mask, weight.float(), 0.0)).sum()


def insertion_loss_sum(log_rate: Tensor, missing: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weighted Poisson negative log-likelihood ``lambda - k log lambda``, summed over sites.

    Above ``MAX_LOG_RATE`` the exponential goes on as its tangent, so that a rate which overshot still gets a
    (bounded) gradient back; a plain clamp would leave it there for ever.

    Args:
        log_rate: [F], log lambda.
        missing: [F], k, the number of deleted frames to the right of each frame.
        mask: bool [F], visible frames that may insert while ``tau_g < 1``. The rest, even NaN, has no effect.
        weight: [F], the clip's importance weight.

    Returns:
        float32 scalar.
    """
    log_rate = torch.where(mask, log_rate.float(), 0.0)
    count = torch.where(mask, missing.float(), 0.0)
    overshoot = torch.relu(log_rate - MAX_LOG_RATE)
    rate = torch.exp(log_rate.clamp(max=MAX_LOG_RATE)) + math.exp(MAX_LOG_RATE) * overshoot
    return ((rate - count * log_rate) * torch.where(mask, weight.float(), 0.0)).sum()


class Denominators(NamedTuple):
    """What a step's loss sums are divided by."""

    velocity: float
    """Expected latent elements in flow state."""
    insertion: float
    """Expected sites with an insertion loss."""


def expected_counts(
    roles: Tensor, elements_per_frame: Tensor, schedule: InsertionSchedule, delay_law: DelayLaw | str = "uniform"
) -> tuple[Tensor, Tensor]:
    """Expected loss terms of each clip under global times uniform over the whole clock.

    Each generated frame is in flow state for one unit of the clock: half of them where it ends at 2, all under
    full-sequence, one under autoregression. Sites: active context and start frames are there whenever ``tau_g < 1``,
    a free frame with probability kappa; a prescribed law has none.

    Args:
        roles: int64 [B, N], a ``Role`` for each frame, as the law adapted them.
        elements_per_frame: [B], latent elements (channels x height x width) of a frame.
        schedule: The insertion schedule.
        delay_law: The delay law or its name.

    Returns:
        Velocity elements and insertion sites, float64 [B] each.
    """
    law = build_delay_law(delay_law) if isinstance(delay_law, str) else delay_law
    clock_end = law.clock_end(roles)
    velocity = is_generated(roles).sum(dim=1) / clock_end * torch.as_tensor(elements_per_frame, dtype=torch.float64)
    if not law.inserts:
        return velocity, torch.zeros_like(velocity)
    present = ((roles == Role.START) | (roles == Role.CONTEXT_ACTIVE)).sum(dim=1)
    free = (roles == Role.FREE).sum(dim=1)
    return velocity, (present + free * schedule.mean()) / clock_end


def denominators(velocity: Tensor | NDArray[np.float64], insertion: Tensor | NDArray[np.float64]) -> Denominators:
    """A step's denominators: the ``expected_counts`` of its clips, summed; 1 for a term that it cannot have.

    Args:
        velocity: [B], expected elements of each clip.
        insertion: [B], expected sites of each clip.

    Returns:
        Both denominators, positive.
    """
    return Denominators(float(velocity.sum()) or 1.0, float(insertion.sum()) or 1.0)
