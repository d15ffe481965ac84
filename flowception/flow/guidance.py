"""Classifier-free guidance (arXiv 2207.12598) of both heads.

Extrapolates the velocity from the unconditional to the conditional prediction. The insertion rate has a separate scale
and is extrapolated in log space, so it stays positive. Scale 1 is the conditional prediction, 0 the unconditional one.

Shape legend: ``F`` frames, ``C H W`` a latent frame.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """A model's output for a set of frames."""

    velocity: Tensor
    """[F, C, H, W]."""
    log_rate: Tensor
    """[F], log of the expected number of missing frames to the right of each frame."""


def guide(conditional: Prediction, unconditional: Prediction, scale: float, insertion_scale: float = 1.0) -> Prediction:
    """Mix a conditional and an unconditional prediction of the same frames.

    Args:
        conditional: With the condition.
        unconditional: With the null condition.
        scale: Guidance of the velocity.
        insertion_scale: Guidance of the log-rate.

    Returns:
        ``unconditional + scale * (conditional - unconditional)`` for each head. A head with scale 1 is returned
        unchanged.
    """

    def mix(with_condition: Tensor, without: Tensor, by: float) -> Tensor:
        return with_condition if by == 1 else torch.lerp(without, with_condition, by)

    return Prediction(
        mix(conditional.velocity, unconditional.velocity, scale),
        mix(conditional.log_rate, unconditional.log_rate, insertion_scale),
    )
