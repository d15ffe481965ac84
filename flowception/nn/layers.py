"""The small parts of the Flowception DiT. Each says how its own parameters begin (``flowception.nn.initialise``).

Shape legend: ``T`` tokens, ``F`` frames, ``R`` rows of a modulation table (frames, then clips for their text), ``d``
hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowception.nn.flops import COUNT_FEATURES, GRID_FEATURES, TIME_FEATURES

NORM_EPSILON = 1e-6
SMALLEST_REMAINDER = 1e-3
"""Added to 1 - t before its logarithm; a twentieth of a step of a 50-step sampler."""


class Linear(nn.Linear):
    """A linear layer that keeps variance at the start, or starts at zero (``zero=True``)."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, zero: bool = False, bias_value: float = 0.0
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.zero, self.bias_value = zero, bias_value

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal with variance ``1 / in_features``, or zero; the bias is constant."""
        if name == "bias":
            return torch.full(shape, self.bias_value)
        if self.zero:
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator) / math.sqrt(self.in_features)


class Float32Linear(Linear):
    """A linear layer that computes in float32 whatever its weights are and under autocast too.

    For the few outputs that must be resolved more finely than bfloat16's 2^-8. The weights are cast in the forward of
    the module that owns them: there ZeRO-3 has gathered them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` of any float dtype to float32 ``[..., out_features]``."""
        bias: Tensor | None = self.bias
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if bias is None else bias.float())


class Embedding(nn.Embedding):
    """A table of learnt vectors."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal with standard deviation 0.02, as in DiT."""
        return 0.02 * torch.randn(shape, generator=generator)


class RMSNorm(nn.Module):
    """Root mean square norm of the last dimension with a learnt weight (for queries and keys)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """One."""
        return torch.ones(shape)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same shape, float32: what follows (the rotation) is done in float32."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), NORM_EPSILON)


class SwiGLU(nn.Module):
    """``W_out (silu(W_gate x) * W_value x)`` with both inputs in one matrix."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.gate_and_value = Linear(size, 2 * hidden_size, bias=False)
        self.output = Linear(hidden_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same shape."""
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


def waves(x: Tensor, lowest: float, highest: float, features: int) -> Tensor:
    """Sines and cosines of ``x`` at geometrically spaced angular frequencies.

    Args:
        x: float32, any shape.
        lowest: Lowest frequency, radians per unit of x.
        highest: Highest frequency.
        features: How many numbers, half sines, half cosines.

    Returns:
        float32 ``[..., features]``.
    """
    exponent = torch.linspace(0.0, 1.0, features // 2, device=x.device)
    angles = x.unsqueeze(-1) * (lowest * (highest / lowest) ** exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_features(position: Tensor) -> Tensor:
    """A token's row and column as waves: float32 ``[T, 3]`` (rank, row, column) to ``[T, GRID_FEATURES]``.

    Rows and columns are counted from the frame's middle, in cells; the waves tell neighbouring cells apart and do not
    come round within 60 cells.
    """
    return waves(position[:, 1:], 0.05, 2.0, GRID_FEATURES // 2).flatten(1)


class FeatureMLP(nn.Module):
    """Features to a vector of the hidden size."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.hidden = Linear(features, size)
        self.output = Linear(size, size)

    def forward(self, features: Tensor) -> Tensor:
        """``[..., features]`` to ``[..., size]``, in the dtype of the weights."""
        output: Tensor = self.output(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))
        return output


class TimeEmbedding(nn.Module):
    """A frame's time as a vector.

    Half of the features are waves of t, half are waves of ``log(1 - t)``: near the clock's end the insertion rate
    changes within one frame, so the remainder 1 - t must be resolved on its own scale (DESIGN.md section 3).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = FeatureMLP(TIME_FEATURES, size)

    def forward(self, time: Tensor) -> Tensor:
        """float32 ``[F]`` in [0, 1] to ``[F, size]``."""
        time = time.float()
        remainder = torch.log((1.0 - time).clamp(min=0.0) + SMALLEST_REMAINDER)
        half = TIME_FEATURES // 2
        parts = [waves(time, 0.5, 200.0, half), waves(remainder, 0.2, 20.0, half)]
        output: Tensor = self.mlp(torch.cat(parts, dim=-1))
        return output


class CountEmbedding(nn.Module):
    """Rank of a frame among the visible ones, and their number, as a vector: attention alone counts badly."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = FeatureMLP(COUNT_FEATURES, size)

    def forward(self, rank: Tensor, visible_frames: Tensor) -> Tensor:
        """Both int64 ``[F]``; gives ``[F, size]``."""
        half = COUNT_FEATURES // 2
        parts = [waves(count.float(), 0.005, 2.0, half) for count in (rank, visible_frames)]
        output: Tensor = self.mlp(torch.cat(parts, dim=-1))
        return output


class InsertionToken(nn.Module):
    """The learnt token that ends each frame and carries its rate, with the counts that the rate depends on."""

    def __init__(self, size: int, count_embedding: bool) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(size))
        self.counts = CountEmbedding(size) if count_embedding else None

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal with standard deviation 0.02."""
        return 0.02 * torch.randn(shape, generator=generator)

    def forward(self, rank: Tensor, visible_frames: Tensor) -> Tensor:
        """Both int64 ``[F]``; gives ``[F, size]``."""
        if self.counts is None:
            return self.vector.repeat(rank.shape[0], 1)
        return self.vector + self.counts(rank, visible_frames)


class _TakeRows(torch.autograd.Function):
    """Rows of a table; the many gradients of one row are added up in float32, also when they are bfloat16."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.table_rows = table.shape[0]
        return table.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (row,) = ctx.saved_tensors
        total = torch.zeros(ctx.table_rows, gradient.shape[1], device=gradient.device)
        return total.index_add_(0, row, gradient.float()).to(gradient.dtype), None


def take_rows(table: Tensor, row: Tensor) -> Tensor:
    """``table[row]``: table ``[R, d]`` and int64 row ``[T]`` to ``[T, d]``."""
    rows: Tensor = _TakeRows.apply(table, row)
    return rows


def modulate(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    """Norm without weights, then each token's own scale and shift (AdaLN).

    Args:
        x: ``[T, d]``.
        shift: ``[R, d]``, zero for none.
        scale: ``[R, d]``, zero for none.
        row: int64 ``[T]``: which row of the tables each token takes.

    Returns:
        ``[T, d]``.
    """
    normed = F.rms_norm(x, (x.shape[-1],), eps=NORM_EPSILON)
    return torch.addcmul(take_rows(shift, row), normed, take_rows(1.0 + scale, row))
