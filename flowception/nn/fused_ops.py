"""The operations of a block between its matrix products, as pure tensor functions that can be compiled.

Eager PyTorch runs each of them as several kernels that read and write full activations; ``torch.compile`` fuses them
into one or two kernels. They own no weights, so ZeRO-3's hooks, which gather a module's weights, never run inside
compiled code.

Shape legend: ``T`` tokens, ``R`` rows of a modulation table (frames, then clips for their text), ``d`` hidden size,
``H`` heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowception.nn.rope import rotate
from flowception.nn.rows import Rows, take_rows

NORM_EPSILON = 1e-6


class FusedOps(NamedTuple):
    """The functions of this module, eager or compiled."""

    modulate: Callable[[Tensor, Tensor, Tensor, Rows], Tensor]
    add_gated: Callable[[Tensor, Tensor, Tensor, Rows], Tensor]
    norm_and_rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Rows) -> Tensor:
    """RMS norm without weights, then a scale and shift per token (AdaLN).

    Args:
        x: ``[T, d]``.
        shift: ``[R, d]``, zero for none.
        scale: ``[R, d]``, zero for none.
        rows: The row of the tables for each token.

    Returns:
        ``[T, d]``.
    """
    normed = F.rms_norm(x, (x.shape[-1],), eps=NORM_EPSILON).to(x.dtype)  # float32 under CUDA autocast
    return torch.addcmul(take_rows(shift, rows), normed, take_rows(1.0 + scale, rows))


def add_gated(x: Tensor, update: Tensor, gate: Tensor, rows: Rows) -> Tensor:
    """``x + gate[row] * update``: x and update ``[T, d]``, gate ``[R, d]``; returns ``[T, d]``."""
    return torch.addcmul(x, update, take_rows(gate, rows))


def norm_and_rotate(heads: Tensor, weight: Tensor, rotations: Tensor) -> Tensor:
    """RMS norm of each head, then its rotation, both in float32.

    Args:
        heads: ``[T, H, d / H]``.
        weight: ``[d / H]``, weight of the norm.
        rotations: float32 ``[T, 1, d / H / 2, 2]``.

    Returns:
        ``[T, H, d / H]`` in the dtype of ``heads``.
    """
    normed = F.rms_norm(heads.float(), (heads.shape[-1],), weight.float(), NORM_EPSILON)
    return rotate(normed, rotations).to(heads.dtype)


def swiglu(gate_and_value: Tensor) -> Tensor:
    """``silu(gate) * value`` of concatenated gate and value: ``[..., 2 n]`` to ``[..., n]``."""
    gate, value = gate_and_value.chunk(2, dim=-1)
    return F.silu(gate) * value


EAGER = FusedOps(modulate=modulate, add_gated=add_gated, norm_and_rotate=norm_and_rotate, swiglu=swiglu)


@lru_cache(maxsize=1)
def compiled_ops() -> FusedOps:
    """The same functions under ``torch.compile``, compiled once per process at the first call.

    The pack shape is constant in a run. A second shape makes the sizes symbolic.
    """
    return FusedOps(*(torch.compile(function) for function in EAGER))
