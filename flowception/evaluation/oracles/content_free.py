"""Exact insertion rates for clips whose content is independent of their length, used in place of the network.

A clip is split into segments: each context frame starts one, and a clip without context is one segment. A segment has
``m`` frames, where each segment has a separate law of m. The first ``present`` of them (or all, if fewer) exist from
the start; every other frame is visible at clock t with probability ``kappa(t)``, and all are exchangeable. Seeing v
frames therefore has likelihood ``Binomial(v - present; m - present, kappa(t))``, and each of the v gaps of the segment
has the same expected number of missing frames, ``(E[m | v] - v) / v``.

The oracle reads only the network's inputs: roles, times and the number of visible frames. The clock is the largest time
in a clip, which is that of an initial frame or of a context frame.

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
    """Infer the insertion clock from the network's inputs, float64 [B].

    Args:
        state: Generated frames carry their own shifted time, context frames the unshifted clock.
    """
    unshifted = torch.where(is_context(state.roles), state.times, shift_time(state.times, 1 / state.time_shift))
    latest = torch.zeros(len(state.clip_frames), dtype=torch.float64)
    return latest.scatter_reduce(0, state.frame_clip, unshifted, "amax")


class ContentFreeOracle:
    """Predicts exact rates and zero velocity."""

    def __init__(self, laws: LengthLaw | Sequence[LengthLaw], schedule: InsertionSchedule, present: int) -> None:
        """Set the laws of the segments.

        Args:
            laws: Length law of each segment of a clip, first frame included; a single law for clips of one segment.
            schedule: kappa.
            present: Initial frames of a segment, its first frame included.
        """
        self.laws = [laws] if isinstance(laws, Mapping) else list(laws)
        self.schedule, self.present = schedule, max(1, present)

    def rate_table(self, clock: float, max_visible: int, segment: int = 0) -> Tensor:
        """Rate of a gap by the number of visible frames of its segment.

        Args:
            clock: t, in [0, 1).
            max_visible: Largest number of visible frames.
            segment: Index of the segment in the clip.

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
        """Predict zero velocity and exact rates.

        Args:
            state: Clips at the same clock, with one segment per law.
        """
        nothing, rate = torch.zeros_like(state.frames), torch.zeros(len(state.frames), dtype=torch.float64)
        clock = shown_clock(state)
        if not len(clock) or bool((clock >= 1).all()):
            return nothing, rate
        if (clock != clock[0]).any():
            raise ValueError(f"clips must share one clock, got {clock.min():g} to {clock.max():g}")
        starts = is_context(state.roles) | (state.frame_rank == 0)
        segment = torch.cumsum(starts, 0) - 1
        visible = torch.bincount(segment)
        if len(visible) != len(self.laws) * len(clock):
            raise ValueError(
                f"every clip must have {len(self.laws)} segments, one per law, got {len(visible)} in {len(clock)} clips"
            )
        which = segment % len(self.laws)
        for number in range(len(self.laws)):
            here = which == number
            table = self.rate_table(float(clock[0]), int(visible.max()), number)
            rate[here] = table[visible[segment[here]]]
        return nothing, rate
