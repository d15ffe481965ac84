"""Layout of the visible frames of many clips in one token buffer of fixed size.

A pack is a concatenation of clips. Each clip is one attention segment::

    text_0 .. text_{L-1} | frame 0: latent_0 .. latent_{hw-1}, insertion | frame 1: ... | ...

Unused tokens at the end form padding segments no longer than ``max_seqlen``. ``PackShape`` fixes the numbers of tokens,
frame slots and clip slots, so a compiled block sees a single shape in a run. Only the inputs of attention and of the
text embedding have the size of the pack's actual segments and text.

Shape legend: ``T`` tokens of a pack, ``F`` frame slots, ``B`` clip slots, ``S`` segments, ``C`` latent channels,
``D`` text width, ``R`` text rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class TokenKind(IntEnum):
    """Kind of a token in a pack."""

    LATENT = 0
    INSERTION = 1
    TEXT = 2
    PADDING = 3


class ModelRole(IntEnum):
    """Role of a frame as the network sees it (docs/method.md)."""

    GENERATED = 0
    ACTIVE = 1
    PASSIVE = 2


class ClipShape(NamedTuple):
    """The visible part of one clip: its frames, latent grid and text tokens."""

    frames: int
    height: int
    width: int
    text_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Latent, insertion and text tokens."""
        return self.text_tokens + self.frames * (self.height * self.width + 1)


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """The static sizes of every pack of a run."""

    token_budget: int
    """T: latent, insertion, text and padding tokens."""
    max_frames: int
    """F: frame slots."""
    max_clips: int
    """B: clip slots."""
    max_seqlen: int
    """Longest attention segment: the longest clip of the dataset with all its frames."""

    @classmethod
    def tight(cls, clips: Sequence[ClipShape]) -> PackShape:
        """The smallest shape that fits the given clips, without padding."""
        return cls(
            token_budget=sum(c.tokens for c in clips),
            max_frames=sum(c.frames for c in clips),
            max_clips=len(clips),
            max_seqlen=max(c.tokens for c in clips),
        )


class HoldsTensors:
    """A dataclass with tensor fields, or fields that are themselves ``HoldsTensors``."""

    def with_leaves(self, kind: type, change: Callable[[Any], Any]) -> Self:
        """A copy with ``change`` applied to every value of type ``kind`` at any depth, in field order."""
        changed: dict[str, Any] = {}
        for known in fields(self):  # type: ignore[arg-type]
            value = getattr(self, known.name)
            if isinstance(value, HoldsTensors):
                changed[known.name] = value.with_leaves(kind, change)
            elif isinstance(value, kind):
                changed[known.name] = change(value)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy with all tensors on ``device``."""
        return self.with_leaves(Tensor, lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory, from which a GPU can copy asynchronously."""
        return self.with_leaves(Tensor, lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Mark all tensors as used by ``stream``, so that their memory is not reused before its queued work is done."""

        def keep(part: Tensor) -> Tensor:
            part.record_stream(stream)
            return part

        self.with_leaves(Tensor, keep)


@dataclass
class PackLayout(HoldsTensors):
    """Positions of all tokens, frames and clips of one pack. Build it with ``build_layout``."""

    shape: PackShape
    segment_lengths: tuple[int, ...]
    """Segment lengths, on the host; they sum to T."""
    cu_seqlens: Tensor
    """int32 [S + 1]: segment boundaries."""
    token_kind: Tensor
    """int64 [T]: a ``TokenKind``."""
    token_frame: Tensor
    """int64 [T]: frame slot of a latent or insertion token; 0 elsewhere."""
    token_clip: Tensor
    """int64 [T]: clip slot; 0 for padding."""
    token_position: Tensor
    """float32 [T, 3]: (rank, row, column). Rows and columns are relative to the frame's center, so an insertion token
    has 0, 0. Text token j of L has rank j - L. Padding is 0."""
    text_token: Tensor
    """int64 [R]: the token of text row r."""
    insertion_token: Tensor
    """int64 [F]: the insertion token of each frame slot; 0 where the slot is unused."""
    frame_clip: Tensor
    """int64 [F]: clip slot; 0 where unused."""
    frame_rank: Tensor
    """int64 [F]: rank among the clip's visible frames."""
    frame_valid: Tensor
    """bool [F]: whether the slot is used."""
    clip_frames: Tensor
    """int64 [B]: visible frames of each clip; 0 where unused."""
    derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Cache of values derived from the layout and shared by all layers, such as attention masks. Copies start empty."""

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment, for attention kernels."""
        return max(self.segment_lengths)

    @property
    def latent_mask(self) -> Tensor:
        """Latent tokens: bool [T]."""
        return self.token_kind == TokenKind.LATENT


@dataclass
class PackInput(HoldsTensors):
    """The network's input."""

    layout: PackLayout
    noisy: Tensor
    """[T, C]: x_t at latent tokens (a context frame is clean), zero elsewhere."""
    condition: Tensor
    """[T, C]: the clean latent of context frames, zero elsewhere."""
    time: Tensor
    """float32 [F], in [0, 1]: time input of each frame, its shifted time if generated, the clock if context."""
    role: Tensor
    """int64 [F]: a ``ModelRole``."""
    class_label: Tensor
    """int64 [B]: class of each clip; -1 is the null class (no condition)."""
    text: Tensor | None
    """[R, D] text embeddings, rows as in ``layout.text_token``; None for a model without text."""


class ModelOutput(NamedTuple):
    """The network's output for a pack."""

    velocity: Tensor
    """[T, C]: predicted x_1 - x_0 at latent tokens; zero elsewhere."""
    log_rate: Tensor
    """float32 [F]: log of the expected number of missing frames to the right of each frame."""


def latent_tokens(frames: Tensor) -> Tensor:
    """Latent frames ``[k, C, h, w]`` to a pack's latent tokens, in order, ``[k h w, C]``."""
    return frames.permute(0, 2, 3, 1).reshape(-1, frames.shape[1])


@lru_cache(maxsize=64)
def _clip_positions(clip: ClipShape) -> tuple[Tensor, Tensor, Tensor]:
    """Kind [n], local frame [n] and position [n, 3] of one clip's tokens. Cached and shared: do not modify them."""
    grid, text = clip.height * clip.width, clip.text_tokens
    rows = torch.arange(clip.height, dtype=torch.float32) - (clip.height - 1) / 2
    columns = torch.arange(clip.width, dtype=torch.float32) - (clip.width - 1) / 2
    one_frame = torch.zeros(grid + 1, 3)
    one_frame[:grid, 1] = rows.repeat_interleave(clip.width)
    one_frame[:grid, 2] = columns.repeat(clip.height)
    position = one_frame.repeat(clip.frames, 1)
    frame = torch.arange(clip.frames).repeat_interleave(grid + 1)
    position[:, 0] = frame.float()
    kind = torch.full((grid + 1,), int(TokenKind.LATENT))
    kind[grid] = int(TokenKind.INSERTION)
    text_position = torch.zeros(text, 3)
    text_position[:, 0] = torch.arange(text, dtype=torch.float32) - text
    return (
        torch.cat([torch.full((text,), int(TokenKind.TEXT)), kind.repeat(clip.frames)]),
        torch.cat([torch.zeros(text, dtype=torch.int64), frame]),
        torch.cat([text_position, position]),
    )


def _check_fit(clips: Sequence[ClipShape], shape: PackShape) -> None:
    seen = {
        "token_budget": sum(c.tokens for c in clips),
        "max_frames": sum(c.frames for c in clips),
        "max_clips": len(clips),
        "max_seqlen": max((c.tokens for c in clips), default=0),
    }
    for name, value in seen.items():
        if value > getattr(shape, name):
            raise ValueError(
                f"{name} must be >= {value} for this pack of {len(clips)} clips, got {getattr(shape, name)}"
            )


def build_layout(clips: Sequence[ClipShape], shape: PackShape | None = None) -> PackLayout:
    """Lay clips out in a pack.

    Args:
        clips: Visible part of each clip, in order.
        shape: Static sizes of the pack; None for the tightest shape, without padding.

    Returns:
        The layout, on the CPU.

    Raises:
        ValueError: If the clips do not fit the shape.
    """
    shape = shape or PackShape.tight(clips)
    _check_fit(clips, shape)
    tokens, frames = shape.token_budget, shape.max_frames
    kind = torch.full((tokens,), int(TokenKind.PADDING))
    token_frame = torch.zeros(tokens, dtype=torch.int64)
    token_clip = torch.zeros(tokens, dtype=torch.int64)
    position = torch.zeros(tokens, 3)
    text_token = torch.zeros(sum(c.text_tokens for c in clips), dtype=torch.int64)
    frame_clip = torch.zeros(frames, dtype=torch.int64)
    frame_rank = torch.zeros(frames, dtype=torch.int64)
    frame_valid = torch.zeros(frames, dtype=torch.bool)
    clip_frames = torch.zeros(shape.max_clips, dtype=torch.int64)
    insertion_token = torch.zeros(frames, dtype=torch.int64)
    lengths: list[int] = []
    at, at_frame, at_text = 0, 0, 0
    for slot, clip in enumerate(clips):
        clip_kind, clip_frame, clip_position = _clip_positions(clip)
        here = slice(at, at + clip.tokens)
        kind[here], position[here], token_clip[here] = clip_kind, clip_position, slot
        token_frame[here] = torch.where(clip_kind == TokenKind.TEXT, 0, clip_frame + at_frame)
        text_token[at_text : at_text + clip.text_tokens] = torch.arange(at, at + clip.text_tokens)
        slots = slice(at_frame, at_frame + clip.frames)
        frame_clip[slots], frame_rank[slots], frame_valid[slots] = slot, torch.arange(clip.frames), True
        insertion_token[slots] = at + torch.nonzero(clip_kind == TokenKind.INSERTION).flatten()
        clip_frames[slot] = clip.frames
        lengths.append(clip.tokens)
        at, at_frame, at_text = at + clip.tokens, at_frame + clip.frames, at_text + clip.text_tokens
    while at < tokens:
        lengths.append(min(shape.max_seqlen, tokens - at))
        at += lengths[-1]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackLayout(
        shape=shape,
        segment_lengths=tuple(lengths),
        cu_seqlens=cu_seqlens,
        token_kind=kind,
        token_frame=token_frame,
        token_clip=token_clip,
        token_position=position,
        text_token=text_token,
        insertion_token=insertion_token,
        frame_clip=frame_clip,
        frame_rank=frame_rank,
        frame_valid=frame_valid,
        clip_frames=clip_frames,
    )
