"""Rotary positions of a pack's tokens, after VideoRoPE (Wei et al., arXiv 2502.05173).

A token of a frame with rank ``r`` at centered row ``i`` and column ``j`` has position ``(t, y, x) = (s r, s r + i, s r
+ j)`` with frame spacing ``s``. The spatial coordinates move along the diagonal, so the center of each frame (the
position of its insertion token) continues the text, whose token ``k`` of ``L`` has ``t = y = x = k - L``.

Of a head's ``d / 2`` angles, the quarter with the LOWEST frequencies encodes time; rows and columns alternate in the
rest. A low frequency does not complete a turn within a clip, so temporal distance is never ambiguous.

Frequencies are ``base^(-k / (d / 2))``. The base is 100 instead of a language model's 10,000: clips have tens of
frames, and a quarter of the frequencies must distinguish them.

Positions depend only on a frame's rank in its clip, not on the rest of the pack.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowception.errors import ConfigError
from flowception.packing.layout import PackLayout, TokenKind


class VideoRoPE:
    """Computes the rotation of every token of a pack, once per forward.

    Args:
        head_dim: Width ``d`` of a head, even and at least 8.
        frame_spacing: Distance in position between adjacent frames.
        base: Ratio of the highest to the lowest frequency.

    Raises:
        ConfigError: If ``head_dim`` is odd or less than 8.
    """

    def __init__(self, head_dim: int, frame_spacing: float, base: float) -> None:
        if head_dim % 2 or head_dim < 8:
            raise ConfigError(
                f"model.hidden_size / model.num_heads must be even and >= 8, got {head_dim}; change one of the two"
            )
        pairs = head_dim // 2
        self.frame_spacing = frame_spacing
        self.frequency = base ** (-np.arange(pairs, dtype=np.float64) / pairs)
        """float64 [d / 2], decreasing. A NumPy array, because torch factories return bfloat16 inside
        ``deepspeed.zero.Init``."""
        axis = 1 + np.arange(pairs, dtype=np.int64) % 2
        axis[pairs - pairs // 4 :] = 0
        self.axis = axis
        """int64 [d / 2]: 0 time, 1 row, 2 column."""
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Frequency (float32) and axis on a device, copied once so that a forward does not wait for a copy."""
        if device not in self._on_device:
            frequency = torch.from_numpy(self.frequency.astype(np.float32))
            self._on_device[device] = (frequency.to(device), torch.from_numpy(self.axis).to(device))
        return self._on_device[device]

    def positions(self, layout: PackLayout) -> Tensor:
        """Coordinates (t, y, x) of every token, float32 ``[T, 3]``."""
        rank, row, column = layout.token_position.unbind(-1)
        spacing = torch.where(layout.token_kind == TokenKind.TEXT, 1.0, self.frame_spacing)
        time = rank * spacing
        return torch.stack([time, time + row, time + column], dim=-1)

    def rotations(self, layout: PackLayout) -> Tensor:
        """Cosine and sine of each pair's rotation angle, float32 ``[T, 1, d / 2, 2]``."""
        positions = self.positions(layout)
        frequency, axis = self._constants(positions.device)
        angles = positions.index_select(1, axis) * frequency
        return torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(1)


def rotate(heads: Tensor, rotations: Tensor) -> Tensor:
    """Rotate adjacent pairs of each head.

    Args:
        heads: ``[T, H, d]``.
        rotations: float32 ``[T, 1, d / 2, 2]``, cosines and sines.

    Returns:
        float32 ``[T, H, d]``.
    """
    pairs = heads.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (x, y), (cosine, sine) = pairs.unbind(-1), rotations.unbind(-1)
        rotated = torch.stack([x * cosine - y * sine, x * sine + y * cosine], dim=-1)
    else:  # the same as a complex product, which is a single kernel but which Inductor would not fuse
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))
    return rotated.flatten(-2)
