"""Attention patterns: which tokens of a clip see each other.

* ``full``: all of them.
* ``causal``: a token sees the tokens of its own frame and of earlier ones.
* ``window``: a token sees the tokens of frames at most K away (``attention_window_frames``).

Frames are counted among the visible ones, and an insertion token belongs to its frame. Under ``causal`` and ``window``
text is seen by every token and sees text alone: text that saw frames would carry what a later or a far frame holds to
everyone in the next layer.

Shape legend: ``T`` tokens of a pack, ``S`` segments, ``U`` runs of neighboring tokens that see alike (a frame, a
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
    """A pattern by name, with the window's K where it has one."""

    name: str = "full"
    window_frames: int | None = None

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
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
        """Whether a token sees another of its clip, bool of the broadcast shape.

        Args:
            query_rank: Rank of the frame of the token that looks, -1 for text.
            key_rank: The same of the token that is looked at.
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
    """Which blocks of token pairs hold a pair that sees, and in which every pair does; without a table of all pairs.

    The tokens of a run see alike and are seen alike, so a table of runs says it all, and sums over rectangles of that
    table count the pairs of runs that see in each block.

    Args:
        layout: Of the pack.
        pattern: Which tokens of a clip see each other.
        block_tokens: Tokens of a block; the last one may have fewer and then counts as not wholly seen.

    Returns:
        Two bool tables ``[N, N]``: looking block, looked at block.
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
