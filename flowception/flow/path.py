"""The straight path from noise to data, and the time shift.

``x_0`` is Gaussian noise, ``x_1`` data, ``x_t = (1 - t) x_0 + t x_1`` and ``velocity = x_1 - x_0`` (rectified flow,
arXiv 2209.03003; names as in ``flow_matching``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """``t / (t + s (1 - t))``: spends more steps near noise, for large latents (docs/method.md).

    Args:
        t: Times in [0, 1], any shape.
        shift: s >= 1; 1 is the identity.

    Returns:
        Shifted times. 0 and 1 are mapped to themselves exactly.
    """
    if shift == 1:
        return t
    return t / (t + shift * (1 - t))


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """``(1 - t) x_0 + t x_1``.

    Args:
        x_0: Noise, [..., *].
        x_1: Data, same shape.
        t: Times in [0, 1], shape of the leading dimensions ``...``.

    Returns:
        ``x_t``, same shape as ``x_0``; exactly ``x_1`` at t = 1.

    Raises:
        ValueError: If the shapes of ``x_0`` and ``x_1`` differ.
    """
    if x_0.shape != x_1.shape:
        raise ValueError(f"noise and data must have the same shape, got {tuple(x_0.shape)} and {tuple(x_1.shape)}")
    time = _like(t, x_0)
    return (1 - time) * x_0 + time * x_1


def velocity_target(x_0: Tensor, x_1: Tensor) -> Tensor:
    """``x_1 - x_0``, the derivative of the path, constant in time."""
    return torch.sub(x_1, x_0)
