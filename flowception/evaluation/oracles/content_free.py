"""Exact insertion rates of clips whose frames say nothing about their length, for the sampler in a network's place.

A clip is cut into segments: each given (context) frame begins one, and a clip without context is one segment. A
segment holds ``m`` frames, m from a law of its own; ``present`` of them (all, where there are fewer) are there from
the beginning, each other one is visible at clock t with probability ``kappa(t)``, and all are exchangeable. So seeing
v frames has likelihood ``Binomial(v - present; m - present, kappa(t))``, and each of the v gaps of the segment holds
the same number of missing frames in expectation, ``(E[m | v] - v) / v``.

The oracle reads only what a network is shown: roles, times and how many frames are visible. The clock is the largest
time in a clip, that of a frame which is there from the beginning, or that of a context frame.

Shape legend: ``B`` clips, ``F`` frames of all clips, ``S`` segments, ``L`` lengths of a law, ``V`` visible counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowception.flow import InsertionSchedule, SamplerState, is_context, shift_time

LengthLaw = Mapping[int, float]
"""Probability of each number of frames."""


def shown_clock(state: SamplerState) -> Tensor:
    """The insertion clock as a network can know it, float64 [B].

    Args:
        state: Its generated frames show their own shifted time, its context frames the plain clock.
    """
    unshifted = torch.where(is_context(state.roles), state.times, shift_time(state.times, 1 / state.time_shift))
    latest = torch.zeros(len(state.clip_frames), dtype=torch.float64)
    return latest.scatter_reduce(0, state.frame_clip, unshifted, "amax")


class ContentFreeOracle:
    """Exact rates, and no velocity."""

    def __init__(self, laws: LengthLaw | Sequence[LengthLaw], schedule: InsertionSchedule, present: int) -> None:
        """Bind the laws of the segments.

        Args:
            laws: Law of the number of frames of each of a clip's segments, its first frame counted; one law for clips
                of one segment.
            schedule: kappa.
            present: Frames of a segment that are there from the beginning, its first one counted.
        """
        self.laws = [laws] if isinstance(laws, Mapping) else list(laws)
        self.schedule, self.present = schedule, max(1, present)

    def rate_table(self, clock: float, max_visible: int, segment: int = 0) -> Tensor:
        """Rate of each gap by number of visible frames of its segment.

        Args:
            clock: t, in [0, 1).
            max_visible: Largest number of visible frames.
            segment: Which of a clip's segments.

        Returns:
            float64 [V + 1], entry v for v visible frames; 0 where v is impossible.
        """
        law = self.laws[segment]
        lengths = torch.tensor(sorted(law), dtype=torch.float64)
        log_prior = torch.tensor([law[int(m)] for m in lengths], dtype=torch.float64).log()
        kappa = self.schedule.kappa(torch.tensor(clock, dtype=torch.float64))
        present = lengths.clamp(max=self.present)
        visible = torch.arange(max_visible + 1, dtype=torch.float64)[:, None]
        free, seen, hidden = lengths - present, visible - present, lengths - visible
        possible = (seen >= 0) & (hidden >= 0) & ((seen == 0) | (kappa > 0))
        inside, outside = seen.clamp(min=0), hidden.clamp(min=0)
        choose = torch.lgamma(free + 1) - torch.lgamma(inside + 1) - torch.lgamma(outside + 1)
        log_joint = choose + torch.xlogy(inside, kappa) + torch.xlogy(outside, 1 - kappa) + log_prior
        posterior = torch.softmax(torch.where(possible, log_joint, -torch.inf), dim=1).nan_to_num(0.0)
        mean_missing = (posterior * outside).sum(dim=1)
        return mean_missing / visible[:, 0].clamp(min=1)

    def __call__(self, state: SamplerState) -> tuple[Tensor, Tensor]:
        """Predictor: no velocity, exact rates.

        Args:
            state: Clips of as many segments as there are laws, all at one clock.
        """
        nothing, rate = torch.zeros_like(state.frames), torch.zeros(len(state.frames), dtype=torch.float64)
        clock = shown_clock(state)
        if not len(clock) or bool((clock >= 1).all()):
            return nothing, rate
        if (clock != clock[0]).any():
            raise ValueError(f"clips are shown clocks from {clock.min():g} to {clock.max():g}; they must share one")
        begins = is_context(state.roles) | (state.frame_rank == 0)
        segment = torch.cumsum(begins, 0) - 1
        visible = torch.bincount(segment)
        if len(visible) != len(self.laws) * len(clock):
            raise ValueError(
                f"{len(clock)} clips have {len(visible)} segments; there are laws of {len(self.laws)} each"
            )
        which = segment % len(self.laws)
        for number in range(len(self.laws)):
            here = which == number
            table = self.rate_table(float(clock[0]), int(visible.max()), number)
            rate[here] = table[visible[segment[here]]]
        return nothing, rate
