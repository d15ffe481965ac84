"""Attention patterns: which tokens of a clip see each other.

* ``full``: all of them.
* ``causal``: a token sees the tokens of its own frame and of earlier ones.
* ``window``: a token sees the tokens of frames at most K away (``attention_window_frames``).

Frames are counted among the visible ones, and an insertion token belongs to its frame. Under ``causal`` and ``window``
text is seen by every token and sees text alone: text that saw frames would carry what a later or a far frame holds to
everyone in the next layer.

Shape legend: ``T`` tokens of a pack, ``S`` segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowception.errors import ConfigError
from flowception.nn.layout import PackLayout

PATTERNS = ("full", "causal", "window")


@dataclass(frozen=True)
class AttentionPattern:
    """A pattern by name, with the window's K where it has one."""

    name: str = "full"
    window_frames: int | None = None

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.name not in PATTERNS:
            raise ConfigError(f"attention_pattern is {self.name!r}; give one of {', '.join(PATTERNS)}")
        if self.name == "window" and (self.window_frames is None or self.window_frames < 1):
            raise ConfigError(
                f"attention_window_frames is {self.window_frames}; attention_pattern=window needs 1 or more"
            )
        if self.name != "window" and self.window_frames is not None:
            raise ConfigError(
                f"attention_window_frames is {self.window_frames} and attention_pattern is {self.name}; give null, or "
                "attention_pattern=window"
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
