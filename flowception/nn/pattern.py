"""Attention patterns: which tokens of a clip see each other.

* ``full``: all of them.
* ``causal``: a token sees its own frame and earlier frames.
* ``window``: a token sees frames at most K away (``attention_window_frames``).

Only visible frames are counted, and an insertion token belongs to its frame. Under ``causal`` and ``window``, every
token sees the text, but text sees only text. Otherwise text would pass information from later or distant frames to all
tokens in the next layer.

Shape legend: ``T`` tokens of a pack, ``S`` segments, ``U`` runs of adjacent tokens with the same visibility (a frame, a
clip's text, a padding segment), ``N`` blocks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowception.errors import ConfigError
from flowception.packing.layout import PackLayout
from flowception.ranges import integer, one_of

PATTERNS = ("full", "causal", "window")


@dataclass(frozen=True)
class AttentionPattern:
    """A pattern by name, with K for ``window``."""

    name: str = "full"
    window_frames: int | None = None

    def __post_init__(self) -> None:
        """Check the name and K."""
        one_of(PATTERNS).check("model.attention_pattern", self.name)
        if self.name == "window":
            rule = integer(at_least=1, note="attention_pattern is window")
            rule.check("model.attention_window_frames", self.window_frames)
        elif self.window_frames is not None:
            raise ConfigError(
                "model.attention_window_frames must be null unless model.attention_pattern is window, got "
                f"{self.window_frames} and {self.name}"
            )

    def sees(self, query_rank: Tensor, key_rank: Tensor) -> Tensor:
        """Whether a query token sees a key token of the same clip, bool of the broadcast shape.

        Args:
            query_rank: Rank of the query token's frame, -1 for text.
            key_rank: Rank of the key token's frame, -1 for text.
        """
        if self.name == "full":
            return torch.ones_like(query_rank == key_rank)
        if self.name == "causal":
            return key_rank <= query_rank
        near = (query_rank - key_rank).abs() <= (self.window_frames or 0)
        return (key_rank < 0) | ((query_rank >= 0) & near)


FULL = AttentionPattern()


def token_ranks(layout: PackLayout) -> Tensor:
    """Rank of each token's frame among its clip's visible frames, int64 [T]; -1 for text, 0 for padding."""
    return layout.token_position[:, 0].clamp(min=-1).to(torch.int64)


def token_segments(layout: PackLayout) -> Tensor:
    """Segment of each token, int64 [T]."""
    places = torch.arange(layout.token_kind.shape[0], device=layout.cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(layout.cu_seqlens[1:].contiguous(), places, right=True)


def visible_blocks(layout: PackLayout, pattern: AttentionPattern, block_tokens: int) -> tuple[Tensor, Tensor]:
    """Blocks of token pairs with at least one visible pair, and blocks where all pairs are visible.

    Does not build the table of all pairs. The tokens of a run have the same visibility, so a table of runs is enough,
    and sums over rectangles of that table count the visible pairs of runs in each block.

    Args:
        layout: Layout of the pack.
        pattern: Which tokens of a clip see each other.
        block_tokens: Tokens per block. A shorter last block never counts as fully visible.

    Returns:
        Two bool tables ``[N, N]``: query block, key block.
    """
    segment, rank = token_segments(layout), token_ranks(layout)
    begins = (segment.diff() != 0) | (rank.diff() != 0)
    run = F.pad(begins.cumsum(0), (1, 0))
    shape, tokens = layout.shape, len(run)
    runs = shape.max_frames + shape.max_clips + len(layout.segment_lengths)
    run_segment, run_rank = (part.new_zeros(runs).scatter(0, run, part) for part in (segment, rank))
    seen = (run_segment[:, None] == run_segment) & pattern.sees(run_rank[:, None], run_rank)
    pairs = F.pad(seen.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32), (1, 0, 1, 0))
    first = torch.arange(0, tokens, block_tokens, device=run.device)
    last = (first + block_tokens - 1).clamp(max=tokens - 1)
    start, stop = run[first], run[last] + 1
    count = (pairs[stop] - pairs[start])[:, stop] - (pairs[stop] - pairs[start])[:, start]
    whole = first + block_tokens <= tokens
    every = (count == (stop - start)[:, None] * (stop - start)) & whole[:, None] & whole
    return count > 0, every
