"""Both training losses as weighted sums, and the counts that normalize them.

A micro-step's loss is ``S_v / N_v + insertion_loss_weight * S_i / N_i``. ``S`` are the sums below. ``N`` are the
expected counts of the step's clips over ``tau_g ~ U(0, 2)`` and the delays, computed from the roles alone. They are
therefore identical on every rank without communication (docs/method.md).

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
    """The insertion rate: expected number of missing frames to the right of a frame.

    Args:
        log_rate: The rate head's output, any shape.

    Returns:
        ``exp(log_rate)`` in float32 or float64, with a clamped exponent.
    """
    log_rate = log_rate if log_rate.dtype == torch.float64 else log_rate.float()
    return torch.exp(log_rate.clamp(MIN_LOG_RATE, MAX_LOG_RATE))


def velocity_loss_sum(velocity: Tensor, target: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error, summed over masked tokens and their channels.

    Args:
        velocity: [T, C], the model's output.
        target: [T, C], ``x_1 - x_0``.
        mask: bool [T], tokens of generated frames in flow state. Other values have no effect, even NaN.
        weight: [T], the clip's importance weight.

    Returns:
        float32 scalar.
    """
    error = torch.where(mask[:, None], velocity.float() - target.float(), 0.0)
    return (error.square().sum(dim=1) * torch.where(mask, weight.float(), 0.0)).sum()


def insertion_loss_sum(log_rate: Tensor, missing: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weighted Poisson negative log-likelihood ``lambda - k log lambda``, summed over sites.

    Above ``MAX_LOG_RATE`` the exponential continues as its tangent, so a rate that overshoots still has a (bounded)
    gradient. With a plain clamp the gradient would vanish and the rate could never recover.

    Args:
        log_rate: [F], log lambda.
        missing: [F], k, the number of deleted frames to the right of each frame.
        mask: bool [F], visible frames that may insert while ``tau_g < 1``. Other values have no effect, even NaN.
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
    """Normalizers of a step's loss sums."""

    velocity: float
    """Expected latent elements in flow state."""
    insertion: float
    """Expected sites with an insertion loss."""


def expected_counts(
    roles: Tensor, elements_per_frame: Tensor, schedule: InsertionSchedule, delay_law: DelayLaw | str = "uniform"
) -> tuple[Tensor, Tensor]:
    """Expected loss terms of each clip, for global times uniform over the full clock.

    Each generated frame is in flow state for one unit of the clock. On average that is half of the frames if the clock
    ends at 2, all of them for full-sequence, and one for autoregression. Insertion sites: active context and start
    frames are present whenever ``tau_g < 1``, a free frame with probability kappa. A prescribed law has no sites.

    Args:
        roles: int64 [B, N], a ``Role`` for each frame, after ``DelayLaw.adapt_roles``.
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
    """A step's denominators: the sum of its clips' ``expected_counts``; 1 for a term with an expected count of 0.

    Args:
        velocity: [B], expected elements of each clip.
        insertion: [B], expected sites of each clip.

    Returns:
        Both denominators, positive.
    """
    return Denominators(float(velocity.sum()) or 1.0, float(insertion.sum()) or 1.0)
