"""The prior of the global time ``tau_g`` for clocks that end at 2, and the variance cost of its weights.

A fraction ``insertion_share`` of its mass is on (0, 1), where frames are inserted and few are visible; the rest is on
(1, 2). Importance weights correct it to U(0, 2), the sampler's law (docs/method.md).

Shape legend: ``B`` clips.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def two_part_prior(u_time: Tensor, insertion_share: float) -> tuple[Tensor, Tensor]:
    """Global times and importance weights from uniforms.

    Args:
        u_time: [B], uniforms in [0, 1).
        insertion_share: w, fraction of times below 1.

    Returns:
        ``tau_g`` [B] in [0, 2) and weights [B]: ``0.5 / w`` below 1 and ``0.5 / (1 - w)`` above, or 1 if w is 1.
    """
    if insertion_share == 1:
        return u_time, torch.ones_like(u_time)
    below = u_time < insertion_share
    largest_below = float(np.nextafter(1.0, 0.0))
    early = (u_time / insertion_share).clamp(max=largest_below)
    late = 1 + ((u_time - insertion_share) / (1 - insertion_share)).clamp(0, largest_below)
    weight = torch.where(below, 0.5 / insertion_share, 0.5 / (1 - insertion_share)).to(u_time.dtype)
    return torch.where(below, early, late), weight


def two_part_uniform(global_time: Tensor, insertion_share: float) -> Tensor:
    """Inverse of ``two_part_prior``: the uniforms for given global times; >= 1 for times outside its range.

    Args:
        global_time: [B], at least 0.
        insertion_share: w.

    Returns:
        [B].
    """
    if insertion_share == 1:
        return global_time
    late = insertion_share + (global_time - 1) * (1 - insertion_share)
    return torch.where(global_time < 1, global_time * insertion_share, late)


def effective_sample_ratio(insertion_share: float) -> float:
    """Effective sample size ratio of the importance weights: ``1 / (0.25 / w + 0.25 / (1 - w))``; 1 at w = 1."""
    if insertion_share == 1:
        return 1.0
    return 1 / (0.25 / insertion_share + 0.25 / (1 - insertion_share))
