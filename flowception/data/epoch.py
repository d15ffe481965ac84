"""The steps of one epoch: which clips each step takes and which pack each clip goes to.

An epoch's order is cut into segments. Each segment is planned independently and yields the same number of steps, all
full. The clips that its steps do not take are planned at the end of the epoch, together with the places after the last
segment. So any step is known without the steps before it: only its own segment is planned. The cuts follow from the
expected costs of the clips, which the index determines. A segment holds about ``SEGMENT_CLIPS`` clips. Its expected
tokens exceed what its steps can take by four standard deviations and half a percent (one to three percent in all), so
that it does not run short. An epoch smaller than two segments has no segments.

Inside a segment, steps are made in order. A step is offered the clips carried over, then the next clips in order, up to
and including the clip that crosses the limit of ``(1 - headroom) G T`` tokens. All are packed longest first. A clip
that does not fit is carried to the next step, and is packed before all others only after ``PATIENCE_STEPS`` steps
carried it. Both rules raise the fill where packs are small: the extra clip gives a choice for the last gaps, and a
small clip fills a gap best when it comes last.

Shape legend: ``K`` clips of the epoch by place, ``k`` clips of a step, ``m`` of a segment, ``G`` packs of a step.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowception.data.clip_costs import ClipCosts
from flowception.data.expected_tokens import TOKEN_UNITS
from flowception.data.step_plan import PlanConfig
from flowception.errors import PlanError
from flowception.packing.balance import CARRIED, pack_clips

SEGMENT_CLIPS = 65536
_CHUNK_CLIPS = 4096
_MARGIN_DEVIATIONS = 4.0
_MARGIN_BIAS = 5e-3
"""Relative error of expected tokens that all clips may share (``expected_tokens.py``)."""
_KEPT_SEGMENTS = 2
PATIENCE_STEPS = 2
"""A clip carried over by this many steps is packed before all others, so no clip waits forever. Not earlier: packing is
best when the smallest clips come last, and those are the ones carried over."""


CostsOf = Callable[[NDArray[np.int64]], ClipCosts]
"""Returns the costs of the clips at the given places."""


@dataclass(frozen=True)
class StepClips:
    """One step: its packs, and the costs of their clips in the order of the packs."""

    packs: list[NDArray[np.int64]]
    """G arrays of places."""
    costs: ClipCosts
    """[k]."""


class StepMaker:
    """Makes steps from given places, in order and on request, without reading shards."""

    def __init__(self, places: NDArray[np.int64], costs_of: CostsOf, sizes: PlanConfig) -> None:
        """Start before the first step.

        Args:
            places: [m] places of the epoch.
            costs_of: Costs of clips by place.
            sizes: Sizes of steps and packs.
        """
        self._places, self._costs_of, self._sizes = places, costs_of, sizes
        num_places = len(places)
        self._costs = ClipCosts(np.zeros(num_places, np.int64), *(np.zeros(num_places) for _ in range(5)))
        self._drawn, self._next = 0, 0
        self._carried: NDArray[np.int64] = np.zeros(0, np.int64)
        self._left_over: NDArray[np.int64] = np.zeros(0, np.int64)
        self._steps: list[list[NDArray[np.int64]]] = []

    def step(self, number: int) -> StepClips | None:
        """A step by its number; None if the places are used up before it."""
        while len(self._steps) <= number and self._is_left():
            self._make_step()
        if number >= len(self._steps):
            return None
        packs = self._steps[number]
        return StepClips([self._places[pack] for pack in packs], self._costs[np.concatenate(packs)])

    def count(self) -> int:
        """Number of steps until all places are used up."""
        while self._is_left():
            self._make_step()
        return len(self._steps)

    def left_after(self, steps: int) -> NDArray[np.int64]:
        """Places that the first ``steps`` steps do not take, in order."""
        self.step(steps - 1)
        taken = np.concatenate([pack for packs in self._steps[:steps] for pack in packs])
        return np.delete(self._places, taken)

    def _is_left(self) -> bool:
        return self._next < len(self._places) or len(self._carried) > 0

    def _draw_chunk(self) -> None:
        chunk = slice(self._drawn, min(self._drawn + _CHUNK_CLIPS, len(self._places)))
        for name, values in vars(self._costs_of(self._places[chunk])).items():
            getattr(self._costs, name)[chunk] = values
        self._drawn = chunk.stop

    def _take(self) -> NDArray[np.int64]:
        """Clips offered to the next step: those carried over, then the next in order through the one over the limit.

        These are positions in ``places``, as everywhere in this class.
        """
        room = self._sizes.limit - int(self._costs.tokens[self._carried].sum())
        while True:
            total = np.cumsum(self._costs.tokens[self._next : self._drawn])
            if self._drawn == len(self._places) or (len(total) and total[-1] > room):
                break
            self._draw_chunk()
        count = min(int(np.searchsorted(total, room, side="right")) + 1, len(total))
        taken = np.arange(self._next, self._next + count)
        self._next += count
        return np.concatenate([self._carried, taken])

    def _make_step(self) -> None:
        offered, num_packs = self._take(), self._sizes.packs_per_step
        left_over = np.zeros(len(offered), np.int64)
        left_over[: len(self._left_over)] = self._left_over
        tokens, flops = self._costs.tokens[offered], self._costs.flops[offered]
        num_urgent = int((left_over >= PATIENCE_STEPS).sum())
        assigned = pack_clips(tokens, flops, num_packs, self._sizes.token_budget, num_urgent)
        carried = np.flatnonzero(assigned == CARRIED)
        carried = carried[np.argsort(-left_over[carried], kind="stable")]
        self._carried, self._left_over = offered[carried], left_over[carried] + 1
        by_pack = np.lexsort((offered, assigned))
        edges = np.searchsorted(assigned[by_pack], np.arange(num_packs + 1))
        taken = offered[by_pack]
        self._steps.append([taken[a:b] for a, b in zip(edges[:-1].tolist(), edges[1:].tolist())])


class EpochSteps:
    """The steps of one epoch, computed on request."""

    def __init__(
        self,
        expected_units: NDArray[np.signedinteger],
        variance_per_token: float,
        largest_clip: int,
        costs_of: CostsOf,
        sizes: PlanConfig,
    ) -> None:
        """Cut an epoch into segments.

        Args:
            expected_units: [K] expected visible tokens of each clip, at least 1, in units of ``1 / TOKEN_UNITS`` token.
            variance_per_token: Largest ratio, over clips, of the variance of a clip's tokens to their mean.
            largest_clip: Most tokens that a clip can have.
            costs_of: Costs of clips by place.
            sizes: Sizes of steps and packs.
        """
        self._costs_of, self._sizes, self._num_places = costs_of, sizes, len(expected_units)
        total = np.cumsum(expected_units, dtype=np.int64) / TOKEN_UNITS
        clips_per_step = sizes.capacity / (total[-1] / len(total))
        self._steps_per_segment = max(1, round(SEGMENT_CLIPS / clips_per_step))
        most = self._steps_per_segment * min(sizes.capacity, sizes.limit + largest_clip) + largest_clip
        margin = _MARGIN_DEVIATIONS * np.sqrt(variance_per_token * most) + _MARGIN_BIAS * most
        tokens = int(np.ceil(most + margin))
        num_segments = int(total[-1] // tokens)
        if num_segments < 2:
            num_segments = 0
        ends = np.searchsorted(total, tokens * np.arange(num_segments + 1))
        self._starts: list[int] = ends.tolist()
        self._segments: OrderedDict[int, StepMaker] = OrderedDict()
        self._left: dict[int, NDArray[np.int64]] = {}
        self._rest: StepMaker | None = None
        self._reached = 0

    @property
    def num_segments(self) -> int:
        """Number of segments; their steps come first."""
        return len(self._starts) - 1

    def step(self, number: int) -> StepClips | None:
        """A step by its number; None if the epoch ends before it."""
        segment, inside = divmod(number, self._steps_per_segment)
        self._reached = max(self._reached, segment)
        if segment >= self.num_segments:
            return self._remainder().step(number - self.num_segments * self._steps_per_segment)
        found = self._segment(segment).step(inside)
        if found is None:
            raise PlanError(f"segment {segment} of an epoch ends before its step {inside}; this is a bug in the plan")
        if inside == self._steps_per_segment - 1:
            self.plan_segment(segment)
        return found

    def has(self, number: int) -> bool:
        """Whether the epoch has a step with this number."""
        return number < self.num_segments * self._steps_per_segment or self.step(number) is not None

    def count(self) -> int:
        """Number of steps of the epoch. Plans all of it."""
        return self.num_segments * self._steps_per_segment + self._remainder().count()

    def plan_leftovers(self) -> None:
        """Plan one segment whose leftover clips are still unknown, if any, starting from the last."""
        unknown = [segment for segment in range(min(self._reached, self.num_segments)) if segment not in self._left]
        if unknown:
            self.plan_segment(unknown[-1])

    def plan_segment(self, segment: int) -> None:
        """Find the clips that a segment leaves for the end of the epoch, unless they are known already."""
        if segment not in self._left:
            self._left[segment] = self._segment(segment).left_after(self._steps_per_segment)
            return_freed_memory()

    def _segment(self, segment: int) -> StepMaker:
        if segment not in self._segments:
            places = np.arange(self._starts[segment], self._starts[segment + 1])
            self._segments[segment] = StepMaker(places, self._costs_of, self._sizes)
            if len(self._segments) > _KEPT_SEGMENTS:
                self._segments.popitem(last=False)
        self._segments.move_to_end(segment)
        return self._segments[segment]

    def _remainder(self) -> StepMaker:
        if self._rest is None:
            for segment in range(self.num_segments):
                self.plan_segment(segment)
            left = [self._left[segment] for segment in range(self.num_segments)]
            places = np.concatenate([*left, np.arange(self._starts[-1], self._num_places)])
            self._rest = StepMaker(places, self._costs_of, self._sizes)
        return self._rest


def return_freed_memory() -> None:
    """Return freed memory to the OS where glibc keeps it; elsewhere do nothing.

    Making the order of an epoch of millions of clips takes five times the memory of the result. After a few frees,
    glibc keeps blocks of such sizes permanently, in each rank of a node.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
