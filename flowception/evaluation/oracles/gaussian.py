"""Exact velocity and insertion rates for Gaussian clips, used in place of the network in sampler or losses.

The mean of a clip of n frames rises by ``slope`` per frame (0: frames carry no label of their position). The covariance
between frames i and j is ``correlation^|i - j|``, AR(1), and the elements of a frame are independent copies. The
positions of the visible frames are hidden from the predictor, so they are enumerated: a hypothesis is a length n,
positions of the context, and the set of visible positions. With kappa the schedule at clock t and v visible frames,

    P(hypothesis | clock) ~ p(n) p(context | n) / C(others, seen) Binomial(seen - starts; others - starts, kappa)

where ``others`` are the frames whose presence is uncertain (all except context and frame 0). Given a hypothesis, let m
and S be mean and covariance at its positions and T the diagonal of times. The visible frames are
``x ~ N(T m, T S T + (1 - T)^2)``. With C this covariance, the velocity ``E[x_1 - x_0 | x]`` is
``m + (S T - (1 - T)) C^-1 (x - T m)``, and the rate is the number of positions skipped. Both are averaged over the
posterior of the hypotheses.

Shape legend: ``B`` clips, ``F`` frames of all clips, ``v`` visible frames of a clip, ``E`` elements of a frame, ``H``
hypotheses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowception.flow import InsertionSchedule, Role, SamplerState, is_context

_NEVER = 1e-12
"""kappa is clamped this far from 0 and 1, so that a clip impossible under the law still has a nearest hypothesis."""


@dataclass(frozen=True, kw_only=True)
class GivenFrames:
    """Positions of a clip's context frames."""

    positions: tuple[int, ...]
    active: tuple[bool, ...]
    """Whether frames may be inserted right of each. The law must hide no frame right of a passive one."""
    probability: float = 1.0


NO_CONTEXT = GivenFrames(positions=(), active=())


@dataclass(frozen=True, kw_only=True)
class GaussianClips:
    """A fully known law of clips."""

    lengths: Mapping[int, float]
    """Probability of each number of frames."""
    correlation: float
    """Correlation of neighboring frames, between -1 and 1."""
    slope: float = 0.0
    """Frame i has mean ``slope * i``."""
    context: Callable[[int], Sequence[GivenFrames]] = lambda num_frames: [NO_CONTEXT]
    """Law of a clip's context, given its number of frames."""
    num_start_frames: int = 1
    """As in ``ProcessConfig``; clips with context have these in addition."""

    def mean(self, num_frames: int) -> Tensor:
        """Mean of the frames, float64 [n]."""
        return self.slope * torch.arange(num_frames, dtype=torch.float64)

    def covariance(self, num_frames: int) -> Tensor:
        """Covariance of the frames, float64 [n, n]."""
        place = torch.arange(num_frames)
        return torch.tensor(self.correlation, dtype=torch.float64) ** (place[:, None] - place).abs()

    def draw(self, num_frames: int, clips: int, generator: torch.Generator) -> Tensor:
        """Draw clips of one length with one element per frame, float64 [clips, n]."""
        noise = torch.randn(clips, num_frames, dtype=torch.float64, generator=generator)
        return self.mean(num_frames) + noise @ torch.linalg.cholesky(self.covariance(num_frames)).T


@dataclass(frozen=True)
class _Hypotheses:
    """All positions that v visible frames with a given context pattern can have in a clip."""

    positions: Tensor
    """int64 [H, v]."""
    missing: Tensor
    """float64 [H, v], positions skipped right of each visible frame."""
    log_weight: Tensor
    """[H], the clock-independent part of the log prior."""
    free_seen: Tensor
    """[H], visible free frames."""
    free_hidden: Tensor
    """[H], hidden free frames."""


class GaussianOracle:
    """Exact posterior means of the velocity and of the missing counts."""

    def __init__(self, clips: GaussianClips, schedule: InsertionSchedule) -> None:
        self.clips, self.schedule = clips, schedule
        self._known: dict[tuple[int, ...], _Hypotheses] = {}

    def __call__(self, state: SamplerState) -> tuple[Tensor, Tensor]:
        """Predict for a sampler state."""
        return self.predict(state.frames, state.times, state.roles, state.cu_frames, state.clock)

    def predict(
        self, frames: Tensor, times: Tensor, roles: Tensor, cu_frames: Tensor, clock: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Posterior means.

        Args:
            frames: [F, ...], visible frames.
            times: [F], time of each frame; ignored for context frames, which are clean.
            roles: int64 [F], the ``Role`` of each frame. START and FREE are equivalent.
            cu_frames: int64 [B + 1].
            clock: [B], tau_g; beyond 1 all frames are visible.

        Returns:
            Velocity, shaped like ``frames``, and rate, float64 [F]: the mean number of missing frames right of each.
        """
        x, given = frames.flatten(1).double(), is_context(roles)
        t = torch.where(given, 1.0, times.double())
        kind = torch.where(given, roles, int(Role.START))
        velocity, rate = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.float64)
        sizes = cu_frames.diff()
        for visible in sizes.unique().tolist():
            of_size = torch.nonzero(sizes == visible).flatten()
            slots = cu_frames[of_size][:, None] + torch.arange(visible)
            patterns, which = torch.unique(kind[slots], dim=0, return_inverse=True)
            for number, pattern in enumerate(patterns.tolist()):
                here = which == number
                at = slots[here]
                velocity[at], rate[at] = self._of_pattern(tuple(pattern), x[at], t[at], clock[of_size[here]])
        return velocity.reshape(frames.shape).to(frames.dtype), rate

    def _of_pattern(self, pattern: tuple[int, ...], x: Tensor, t: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity [B, v, E] and rate [B, v] of clips with the same context pattern."""
        if pattern not in self._known:
            self._known[pattern] = self._enumerate(pattern)
        known = self._known[pattern]
        mean = self.clips.slope * known.positions.double()
        apart = (known.positions[:, :, None] - known.positions[:, None, :]).abs()
        covariance = torch.tensor(self.clips.correlation, dtype=torch.float64) ** apart
        noise = torch.diag_embed(1 - t)[:, None]
        seen_covariance = t[:, None, :, None] * covariance * t[:, None, None, :] + noise.square()
        error = x[:, None] - (t[:, None] * mean)[..., None]
        factor = torch.linalg.cholesky(seen_covariance)
        whitened = torch.linalg.solve_triangular(factor, error, upper=False)
        solved = torch.linalg.solve_triangular(factor.transpose(-1, -2), whitened, upper=True)
        log_determinant = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) * x.shape[-1]
        kappa = self.schedule.kappa(clock.double().clamp(0, 1)).clamp(_NEVER, 1 - _NEVER)[:, None]
        log_prior = known.log_weight + known.free_seen * kappa.log() + known.free_hidden * torch.log1p(-kappa)
        log_likelihood = -0.5 * whitened.square().sum(dim=(-2, -1)) - log_determinant
        posterior = torch.softmax(log_prior + log_likelihood, dim=1)
        velocity = mean[..., None] + (covariance * t[:, None, None, :] - noise) @ solved
        return torch.einsum("bh,bhve->bve", posterior, velocity), posterior @ known.missing

    def _enumerate(self, pattern: tuple[int, ...]) -> _Hypotheses:
        """All hypotheses for a pattern of ``Role`` numbers, where START denotes a generated frame."""
        found = [found for n, share in self.clips.lengths.items() for found in self._of_length(pattern, n, share)]
        if not found:  # more frames than any clip has, by sampling noise: nothing is missing
            found = [(tuple(range(len(pattern))), len(pattern), 0.0, 0, 0)]
        positions = torch.tensor([item[0] for item in found])
        ends = torch.tensor([[item[1]] for item in found])
        log_weight, seen, hidden = (torch.tensor([item[i] for item in found], dtype=torch.float64) for i in (2, 3, 4))
        return _Hypotheses(positions, (positions.diff(dim=1, append=ends) - 1).double(), log_weight, seen, hidden)

    def _of_length(
        self, pattern: tuple[int, ...], num_frames: int, share: float
    ) -> list[tuple[tuple[int, ...], int, float, int, int]]:
        """Positions, n, log weight, visible and hidden free frames of each hypothesis of one length."""
        found = []
        for given in self.clips.context(num_frames):
            roles = {
                place: int(Role.CONTEXT_ACTIVE if active else Role.CONTEXT_PASSIVE)
                for place, active in zip(given.positions, given.active, strict=True)
            }
            certain = {0, *given.positions}
            others = num_frames - len(certain)
            starts = min(others, max(0, self.clips.num_start_frames - (0 not in roles)))
            seen = len(pattern) - len(certain)
            if not starts <= seen <= others:
                continue
            # Binomial coefficients: choices of the visible free frames, over choices of the visible others.
            choose = math.comb(others - starts, seen - starts) / math.comb(others, seen)
            log_weight = math.log(share * given.probability * choose)
            for rest in itertools.combinations(sorted(set(range(num_frames)) - certain), seen):
                positions = tuple(sorted([*certain, *rest]))
                if tuple(roles.get(place, int(Role.START)) for place in positions) == pattern:
                    found.append((positions, num_frames, log_weight, seen - starts, others - seen))
        return found
