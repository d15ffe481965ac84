"""Exact forward FLOPs of the Flowception DiT, per clip, without building or running it.

The plan balances packs with these numbers and benchmarks report them, so they count the actual multiplications: linear
layers per token, attention per clip (every visible pair of tokens), and modulation per frame. Masked SDPA also
multiplies the hidden pairs and discards the result; that is a cost of the backend and is not counted. One multiply-add
is two FLOPs. Norms, rotations, gates and lookups are excluded, as in ``torch.utils.flop_counter``, against which the
total is tested.

Shape legend: ``f`` visible frames, ``h x w`` latent grid, ``L`` text tokens, ``n = L + f (h w + 1)`` tokens,
``d`` hidden size. All arguments broadcast, so one call can count a complete epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

TIME_FEATURES = 256
"""Input width of the time embedding: sines and cosines of t and of log(1 - t)."""
COUNT_FEATURES = 128
"""Input width of the count embedding: sines and cosines of a frame's rank and of the number of visible frames."""
TRAINING_PASSES = 3.0
"""Forward plus backward cost three times the forward: the backward of each product has two products."""
GRID_FEATURES = 32
"""Input features for a latent token's row and column."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The resolved sizes of a network that determine its FLOPs."""

    hidden_size: int
    num_layers: int
    num_heads: int
    in_channels: int
    """C: channels of a latent; the network reads 2 C (noisy and condition) and predicts C."""
    mlp_hidden_size: int
    text_dim: int | None = None
    """D: width of a text embedding; None for a network without text."""
    num_classes: int = 0
    count_embedding: bool = True
    grid_embedding: bool = True
    attention_pattern: str = "full"
    """``full``, ``causal`` or ``window`` (``nn.pattern``)."""
    attention_window_frames: int | None = None

    @property
    def latent_inputs(self) -> int:
        """Input channels of a latent token."""
        return 2 * self.in_channels + (GRID_FEATURES if self.grid_embedding else 0)

    @property
    def text_modulation(self) -> bool:
        """Whether the network has text tokens, which have a separate modulation."""
        return self.text_dim is not None


def _float64(*values: ArrayLike) -> list[NDArray[np.float64]]:
    return [np.asarray(value, dtype=np.float64) for value in values]


def clip_tokens(frames: ArrayLike, height: ArrayLike, width: ArrayLike, text_tokens: ArrayLike) -> NDArray[np.float64]:
    """Latent, insertion and text tokens of a clip."""
    f, h, w, text = _float64(frames, height, width, text_tokens)
    return text + f * (h * w + 1)


def _frame_pairs(spec: ModelSpec, frames: NDArray[np.float64]) -> NDArray[np.float64]:
    """Visible (query, key) pairs of a clip's frames, including each frame with itself."""
    if spec.attention_pattern == "causal":
        return frames * (frames + 1) / 2
    if spec.attention_pattern == "window":
        reach = np.minimum(spec.attention_window_frames or 0, np.maximum(frames - 1, 0))
        return frames * (1 + 2 * reach) - reach * (reach + 1)
    return frames**2


def attention_pairs(
    spec: ModelSpec, frames: ArrayLike, height: ArrayLike, width: ArrayLike, text_tokens: ArrayLike = 0
) -> NDArray[np.float64]:
    """Pairs of tokens that attention computes in one layer: ``n^2`` for the full pattern.

    Args:
        spec: The pattern.
        frames: Visible frames of each clip.
        height: Rows of each clip's latent grid.
        width: Columns of each clip's latent grid.
        text_tokens: Text tokens of each clip.

    Returns:
        Pairs, float64, of the broadcast shape.
    """
    f, h, w, text = _float64(frames, height, width, text_tokens)
    per_frame = h * w + 1
    if spec.attention_pattern == "full":
        return (text + f * per_frame) ** 2
    return text**2 + f * per_frame * text + _frame_pairs(spec, f) * per_frame**2


def attention_flops(
    spec: ModelSpec, frames: ArrayLike, height: ArrayLike, width: ArrayLike, text_tokens: ArrayLike = 0
) -> NDArray[np.float64]:
    """Forward FLOPs of attention, ``4 d`` per pair and layer: scores and their product with the values.

    Args:
        spec: Sizes of the network.
        frames: Visible frames of each clip.
        height: Rows of each clip's latent grid.
        width: Columns of each clip's latent grid.
        text_tokens: Text tokens of each clip.

    Returns:
        FLOPs, float64, of the broadcast shape.
    """
    return 4.0 * spec.num_layers * spec.hidden_size * attention_pairs(spec, frames, height, width, text_tokens)


def _linear_per_token(spec: ModelSpec) -> float:
    """FLOPs per token: embedding, blocks (qkv, output, SwiGLU) and velocity head."""
    d = spec.hidden_size
    block = 4 * d * d + 3 * d * spec.mlp_hidden_size
    return 2.0 * (spec.latent_inputs * d + spec.num_layers * block + d * spec.in_channels)


def _linear_per_frame(spec: ModelSpec) -> float:
    """FLOPs per frame: time and count embeddings, modulation of blocks and output, rate head."""
    d = spec.hidden_size
    time = TIME_FEATURES * d + d * d
    count = COUNT_FEATURES * d + d * d if spec.count_embedding else 0
    return 2.0 * (time + count + spec.num_layers * 6 * d * d + 2 * d * d + d * d + d)


def clip_flops(
    spec: ModelSpec,
    frames: ArrayLike,
    height: ArrayLike,
    width: ArrayLike,
    text_tokens: ArrayLike = 0,
    *,
    live_frames: ArrayLike | None = None,
    live_text_tokens: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Forward FLOPs of clips in a pack without padding.

    If the keys and values of some tokens are cached from an earlier evaluation, only the other (live) tokens run
    through the linear layers and act as queries. This is exact for the full pattern, the only one that supports
    caching.

    Args:
        spec: Sizes of the network.
        frames: Visible frames of each clip.
        height: Rows of each clip's latent grid.
        width: Columns of each clip's latent grid.
        text_tokens: Text tokens of each clip.
        live_frames: Computed frames; None for all.
        live_text_tokens: Computed text tokens; None for all.

    Returns:
        FLOPs, float64, of the broadcast shape.
    """
    f, text = _float64(
        frames if live_frames is None else live_frames, text_tokens if live_text_tokens is None else live_text_tokens
    )
    queries, keys = clip_tokens(f, height, width, text), clip_tokens(frames, height, width, text_tokens)
    attended = attention_flops(spec, frames, height, width, text_tokens) * (queries / np.maximum(keys, 1.0))
    total = attended + _linear_per_token(spec) * queries
    total = total + _linear_per_frame(spec) * f
    if spec.text_dim is not None:
        d = spec.hidden_size
        total = total + 2.0 * spec.text_dim * d * text + 2.0 * (d * d + spec.num_layers * 6 * d * d)
    return total


def training_flops(
    spec: ModelSpec, frames: ArrayLike, height: ArrayLike, width: ArrayLike, text_tokens: ArrayLike = 0
) -> NDArray[np.float64]:
    """Forward and backward FLOPs: three times ``clip_flops`` (the backward of each product has two products)."""
    return TRAINING_PASSES * clip_flops(spec, frames, height, width, text_tokens)
