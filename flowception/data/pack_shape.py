"""Static sizes of a run's packs, from the index, and the check that every clip fits into a pack.

Shape legend: ``M`` clips of the index.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowception.errors import PlanError
from flowception.packing.layout import PackShape
from flowception.shards.index import ClipIndex


def _full_tokens(index: ClipIndex, text_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """[M] tokens of each clip with all its frames and its longest text."""
    return text_tokens + index.clips["frames"].astype(np.int64) * index.tokens_per_frame


def static_shape(index: ClipIndex, text_tokens: NDArray[np.int64], token_budget: int) -> PackShape:
    """Sizes that fit every pack of a run. The most frames of T tokens are those of the smallest grid alone.

    Args:
        index: The set's index.
        text_tokens: [M] most text tokens that each clip can have.
        token_budget: T.

    Returns:
        The shape.
    """
    most_frames = token_budget // int(index.tokens_per_frame.min())
    return PackShape(
        token_budget=token_budget,
        max_frames=most_frames,
        max_clips=most_frames,
        max_seqlen=int(_full_tokens(index, text_tokens).max()),
    )


def check_clips_fit(index: ClipIndex, text_tokens: NDArray[np.int64], token_budget: int) -> None:
    """Check that every clip fits into a pack; arguments as in ``static_shape``.

    Raises:
        PlanError: If a clip is longer than a pack; names the longest.
    """
    full = _full_tokens(index, text_tokens)
    worst = int(np.argmax(full))
    if full[worst] > token_budget:
        tokens, text = int(index.tokens_per_frame[worst]), int(text_tokens[worst])
        raise PlanError(
            f"clip {index.key(worst)} has {full[worst]} tokens ({index.clips['frames'][worst]} frames of {tokens}, "
            f"{text} of text), but token_budget is {token_budget}; set token_budget={full[worst]} or more, or encode "
            f"clips of at most {max(0, token_budget - text) // tokens} latent frames"
        )
