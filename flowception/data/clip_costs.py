"""Costs of clips for planning, once their draws are known: tokens, FLOPs, attention pairs, and numbers of losses.

Shape legend: ``k`` clips.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from flowception.data.draws import PackDraws
from flowception.flow.extended_time import ProcessConfig
from flowception.flow.loss import expected_counts
from flowception.packing.flops import ModelSpec, clip_flops
from flowception.shards.index import ClipIndex


@dataclass
class ClipCosts:
    """Costs of some clips, one entry per clip."""

    tokens: NDArray[np.int64]
    """Visible tokens, text included."""
    flops: NDArray[np.float64]
    attention_pairs: NDArray[np.float64]
    """Attention pairs between visible latent and insertion tokens."""
    full_attention_pairs: NDArray[np.float64]
    """Attention pairs if every frame were visible."""
    velocity: NDArray[np.float64]
    """Expected number of elements with a velocity loss."""
    insertion: NDArray[np.float64]
    """Expected number of sites with an insertion loss."""

    def __getitem__(self, which: slice | NDArray[np.int64]) -> ClipCosts:
        return ClipCosts(*(getattr(self, field.name)[which] for field in fields(self)))


def clip_costs(
    index: ClipIndex, rows: NDArray[np.int64], draws: PackDraws, process: ProcessConfig, spec: ModelSpec
) -> ClipCosts:
    """Compute the costs of some clips.

    Args:
        index: The set's index.
        rows: [k] rows of the clips.
        draws: The clips' draws.
        process: The process of the draws.
        spec: Sizes of the network.

    Returns:
        [k] of each cost.
    """
    clips, per_frame = index.clips, index.tokens_per_frame[rows]
    height, width = clips["height"][rows].astype(np.int64), clips["width"][rows].astype(np.int64)
    visible, text = draws.clips.visible_frames.numpy(), draws.text_tokens
    latent_and_insertion = (visible * per_frame).astype(np.int64)
    velocity, insertion = expected_counts(
        draws.clips.roles, torch.from_numpy(spec.in_channels * height * width), process.schedule(), process.delay_law
    )
    return ClipCosts(
        tokens=text + latent_and_insertion,
        flops=clip_flops(spec, visible, height, width, text),
        attention_pairs=latent_and_insertion.astype(np.float64) ** 2,
        full_attention_pairs=(clips["frames"][rows] * per_frame).astype(np.float64) ** 2,
        velocity=velocity.numpy(),
        insertion=insertion.numpy(),
    )
