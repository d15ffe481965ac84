"""Layers of the Flowception DiT. Each defines the initial values of its parameters (``flowception.nn.init``).

Shape legend: ``T`` tokens, ``F`` frames, ``H`` heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowception.nn.fused_ops import FusedOps
from flowception.packing.flops import COUNT_FEATURES, GRID_FEATURES, TIME_FEATURES

SMALLEST_REMAINDER = 1e-3
"""Added to 1 - t before the logarithm; 1/20 of a step of a 50-step sampler."""


class Linear(nn.Linear):
    """A linear layer initialized to preserve variance, or to zero (``zero=True``)."""

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
    """A linear layer that computes in float32 for any weight dtype, and under autocast.

    For the few outputs that need finer resolution than bfloat16's 2^-8. The weights are cast in the forward of the
    module that owns them, where ZeRO-3 has gathered them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` of any float dtype to float32 ``[..., out_features]``."""
        bias: Tensor | None = self.bias
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if bias is None else bias.float())


class Embedding(nn.Embedding):
    """A table of learned vectors."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal with standard deviation 0.02, as in DiT."""
        return 0.02 * torch.randn(shape, generator=generator)


class RotaryNorm(nn.Module):
    """RMS norm of each head with a learned weight, then the rotation (for queries and keys)."""

    def __init__(self, head_dim: int, ops: FusedOps) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.norm_and_rotate = ops.norm_and_rotate

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """One."""
        return torch.ones(shape)

    def forward(self, heads: Tensor, rotations: Tensor) -> Tensor:
        """``[T, H, head_dim]`` and float32 rotations ``[T, 1, head_dim / 2, 2]`` to the shape and dtype of heads."""
        return self.norm_and_rotate(heads, self.weight, rotations)


class SwiGLU(nn.Module):
    """``W_out (silu(W_gate x) * W_value x)``, with gate and value in one matrix."""

    def __init__(self, size: int, hidden_size: int, ops: FusedOps) -> None:
        super().__init__()
        self.gate_and_value = Linear(size, 2 * hidden_size, bias=False)
        self.output = Linear(hidden_size, size, bias=False)
        self.swiglu = ops.swiglu

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same shape."""
        output: Tensor = self.output(self.swiglu(self.gate_and_value(x)))
        return output


def waves(x: Tensor, lowest: float, highest: float, features: int) -> Tensor:
    """Sines and cosines of ``x`` at geometrically spaced angular frequencies.

    Args:
        x: float32, any shape.
        lowest: Lowest frequency, radians per unit of x.
        highest: Highest frequency.
        features: Number of features, half sines, half cosines.

    Returns:
        float32 ``[..., features]``.
    """
    exponent = torch.linspace(0.0, 1.0, features // 2, device=x.device)
    angles = x.unsqueeze(-1) * (lowest * (highest / lowest) ** exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_features(position: Tensor) -> Tensor:
    """Sines and cosines of a token's row and column: float32 ``[T, 3]`` (rank, row, column) to ``[T, GRID_FEATURES]``.

    Rows and columns are measured from the center of the frame, in cells. The frequencies distinguish neighboring cells
    and do not repeat within 60 cells.
    """
    return waves(position[:, 1:], 0.05, 2.0, GRID_FEATURES // 2).flatten(1)


class FeatureMLP(nn.Module):
    """MLP from features to the hidden size."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.hidden = Linear(features, size)
        self.output = Linear(size, size)

    def forward(self, features: Tensor) -> Tensor:
        """``[..., features]`` to ``[..., size]``, in the dtype of the weights."""
        output: Tensor = self.output(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))
        return output


class TimeEmbedding(nn.Module):
    """Embedding of a frame's time.

    Half of the features are sines and cosines of t, half of ``log(1 - t)``. Near the end of the clock the insertion
    rate changes within one frame, so 1 - t needs a logarithmic scale (docs/method.md).
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
    """Embedding of a frame's rank and of the number of visible frames, because attention alone counts poorly."""

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
    """The learned token at the end of each frame that predicts its rate, plus the counts the rate depends on."""

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
