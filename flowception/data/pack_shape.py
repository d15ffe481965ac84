"""The static sizes of a run's packs, from the index: what no pack can exceed.

Shape legend: ``M`` clips.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowception.packing.layout import PackShape


def static_shape(
    token_budget: int,
    num_frames: NDArray[np.int64],
    tokens_per_frame: NDArray[np.int64],
    text_tokens: NDArray[np.int64],
) -> PackShape:
    """Sizes that hold every pack of a run: a pack of T tokens has room for frames of the smallest grid alone.

    Args:
        token_budget: T.
        num_frames: [M] latent frames of every clip of the set.
        tokens_per_frame: [M].
        text_tokens: [M], the most text that each can bring.

    Returns:
        The shape.
    """
    most_frames = token_budget // int(tokens_per_frame.min())
    return PackShape(
        token_budget=token_budget,
        max_frames=most_frames,
        max_clips=most_frames,
        max_seqlen=int((text_tokens + num_frames * tokens_per_frame).max()),
    )
