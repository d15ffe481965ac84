"""Streaming: yield frames as soon as they are final, from the sampler's iterator of states.

A frame is final when it and every frame to its left are at time 1 and nothing can be inserted to its left. Frames are
inserted to the right of frames that may insert, while the clock is below 1. Until the clock reaches 1, only a leading
run of passive context and the next context frame are final. After that, frames become final from left to right as they
finish (docs/method.md). Under a prescribed order the open gaps are known, so an autoregressive clip
is streamed frame by frame.

    for final in stream_frames(sample_states(predict, ...)):
        show(final.clip, final.first_frame, final.frames)

Shape legend: ``B`` clips, ``F`` frames of all clips, ``k`` frames yielded together, ``C H W`` a latent frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowception.flow.sampler_state import SamplerState


@dataclass(frozen=True, kw_only=True)
class FinalFrames:
    """Consecutive frames of one clip whose content and index in the finished clip are final."""

    clip: int
    """Index of the clip in its batch."""
    first_frame: int
    """Index of the first of these frames in the finished clip."""
    frames: Tensor
    """float32 [k, C, H, W], k at least 1."""
    step: int
    """Number of evaluations when they became final."""


def final_lengths(state: SamplerState) -> Tensor:
    """Number of final leading frames of each clip, int64 [B]."""
    blocked = state.moving.long()
    # An open gap blocks the frames to its right.
    blocked[1:] += state.open_gaps[:-1] & (state.frame_rank[1:] > 0)
    in_all = torch.cat([blocked.new_zeros(1), blocked.cumsum(0)])
    in_clip = in_all[1:] - in_all[state.cu_frames[state.frame_clip]]
    return torch.bincount(state.frame_clip[in_clip == 0], minlength=len(state.clip_frames))


def stream_frames(states: Iterable[SamplerState]) -> Iterator[FinalFrames]:
    """Yield every frame once, as soon as it is final.

    Args:
        states: The states of one sampling run in order, from ``sample_states``.

    Yields:
        Runs of frames, from left to right in each clip. Concatenated, they are the finished clips.
    """
    yielded: Tensor | None = None
    for state in states:
        final = final_lengths(state)
        yielded = torch.zeros_like(final) if yielded is None else yielded
        for clip in torch.nonzero(final > yielded).flatten().tolist():
            first, start = int(yielded[clip]), int(state.cu_frames[clip])
            frames = state.frames[start + first : start + int(final[clip])]
            yield FinalFrames(clip=clip, first_frame=first, frames=frames, step=state.step)
        yielded = final
