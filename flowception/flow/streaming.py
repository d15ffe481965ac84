"""Streaming: frames are handed out as soon as they are final, on top of the sampler's iterator of states.

A frame is final when it and every frame to its left are at time 1 and no insertion can come left of it. Insertions
come right of frames that may insert while the clock is below 1, so before the clock ends nothing is final but a
leading run of passive context and the one context frame after it; from then on a clip's frames follow one another
as the frames on the left finish (DESIGN.md section 2, "Streaming"). Under a prescribed order it is known which gaps
stay open, so that an autoregressive clip is handed out frame by frame.

    for final in stream_frames(sample_states(predict, ...)):
        show(final.clip, final.first_frame, final.frames)

Shape legend: ``B`` clips, ``F`` frames of all clips, ``k`` frames handed out at once, ``C H W`` a latent frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowception.flow.sampler_state import SamplerState


@dataclass(frozen=True, kw_only=True)
class FinalFrames:
    """Frames of one clip that will not change any more and have their place in the finished clip."""

    clip: int
    """Number of the clip in its batch."""
    first_frame: int
    """Rank of the first of them in the finished clip."""
    frames: Tensor
    """float32 [k, C, H, W], k at least 1."""
    step: int
    """Evaluations made when they became final."""


def final_lengths(state: SamplerState) -> Tensor:
    """Leading frames of each clip that are final, int64 [B]."""
    blocked = state.moving.long()
    # An open gap blocks the frames to its right.
    blocked[1:] += state.open_gaps[:-1] & (state.frame_rank[1:] > 0)
    in_all = torch.cat([blocked.new_zeros(1), blocked.cumsum(0)])
    in_clip = in_all[1:] - in_all[state.cu_frames[state.frame_clip]]
    return torch.bincount(state.frame_clip[in_clip == 0], minlength=len(state.clip_frames))


def stream_frames(states: Iterable[SamplerState]) -> Iterator[FinalFrames]:
    """Hand out every frame once, as soon as it is final.

    Args:
        states: The states of one sampling run in order, as ``sample_states`` yields them.

    Yields:
        Runs of frames, each clip's from left to right; together they are the finished clips.
    """
    handed_out: Tensor | None = None
    for state in states:
        final = final_lengths(state)
        handed_out = torch.zeros_like(final) if handed_out is None else handed_out
        for clip in torch.nonzero(final > handed_out).flatten().tolist():
            first, start = int(handed_out[clip]), int(state.cu_frames[clip])
            frames = state.frames[start + first : start + int(final[clip])]
            yield FinalFrames(clip=clip, first_frame=first, frames=frames, step=state.step)
        handed_out = final
