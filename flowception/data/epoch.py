"""The steps of one epoch: which clips each step takes and which pack each goes to.

An epoch's order is cut into segments. Each is planned alone and gives the same number of steps, all full; what its
steps leave over is planned at the epoch's end, with the places behind the last segment. So any step is known without
the steps before it: only its own segment is planned, and the cuts follow from what clips are expected to cost, which
the index tells. A segment holds about ``SEGMENT_CLIPS`` clips, and four standard deviations and half a percent more
tokens than its steps can take (one to three percent of it), so that it does not run short. An epoch smaller than two
segments has none.

Inside a segment steps are made in order. A step is offered the clips carried over and then the next in order, up to
and with the clip that crosses the limit of ``(1 - headroom) G T`` tokens. All are packed longest first; what finds no
room is carried, and is packed before all others only once ``PATIENCE_STEPS`` steps left it over. Both raise the fill
where packs are small, because the clip too many leaves a choice of clips to fill the last gaps with, and a small clip
fills a gap best when it comes last.

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
"""Share by which expected tokens may be off for every clip alike (``expected_tokens.py``)."""
_KEPT_SEGMENTS = 2
PATIENCE_STEPS = 2
"""A clip that so many steps left over is packed before all others, so none waits for ever. Not earlier: packing is
best when the smallest clips come last, and those are the ones left over."""


CostsOf = Callable[[NDArray[np.int64]], ClipCosts]
"""Gives the costs of the clips at given places."""


@dataclass(frozen=True)
class StepClips:
    """One step: its packs, and the costs of their clips in the order of the packs."""

    packs: list[NDArray[np.int64]]
    """G arrays of places."""
    costs: ClipCosts
    """[k]."""


class StepMaker:
    """Makes steps of given places, in their order, as far as asked; nothing is read from shards."""

    def __init__(self, places: NDArray[np.int64], costs_of: CostsOf, sizes: PlanConfig) -> None:
        """Begin.

        Args:
            places: [m] places of the epoch.
            costs_of: Their costs.
            sizes: What a step holds.
        """
        self._places, self._costs_of, self._sizes = places, costs_of, sizes
        num_places = len(places)
        self._costs = ClipCosts(np.zeros(num_places, np.int64), *(np.zeros(num_places) for _ in range(5)))
        self._drawn, self._next = 0, 0
        self._carried: NDArray[np.int64] = np.zeros(0, np.int64)
        self._left_over: NDArray[np.int64] = np.zeros(0, np.int64)
        self._steps: list[list[NDArray[np.int64]]] = []

    def step(self, number: int) -> StepClips | None:
        """A step; None if the places are used up before it."""
        while len(self._steps) <= number and self._is_left():
            self._make_step()
        if number >= len(self._steps):
            return None
        packs = self._steps[number]
        return StepClips([self._places[pack] for pack in packs], self._costs[np.concatenate(packs)])

    def count(self) -> int:
        """Steps until all places are used up."""
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
        """What is offered to the next step: what was carried over, then the next in order, with the one that crosses.

        Positions in ``places``, as everywhere in this class.
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
    """The steps of one epoch, each computed when asked for."""

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
            expected_units: [K] visible tokens that each clip has on average, at least 1, in parts of ``TOKEN_UNITS``.
            variance_per_token: The most, over clips, that the variance of a clip's tokens is times their mean.
            largest_clip: Most tokens that a clip can have.
            costs_of: Costs of clips by place.
            sizes: What a step holds.
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
        """How many segments there are; their steps come first."""
        return len(self._starts) - 1

    def step(self, number: int) -> StepClips | None:
        """A step; None if the epoch has ended before."""
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
        """Whether the epoch has a step of this number."""
        return number < self.num_segments * self._steps_per_segment or self.step(number) is not None

    def count(self) -> int:
        """Steps of the whole epoch. Plans all of it."""
        return self.num_segments * self._steps_per_segment + self._remainder().count()

    def plan_left_over(self) -> None:
        """Plan one segment whose left-over clips are not known yet, the last such first, if there is one."""
        unknown = [segment for segment in range(min(self._reached, self.num_segments)) if segment not in self._left]
        if unknown:
            self.plan_segment(unknown[-1])

    def plan_segment(self, segment: int) -> None:
        """Find what a segment leaves over for the epoch's end, if that is not known yet."""
        if segment not in self._left:
            self._left[segment] = self._segment(segment).left_after(self._steps_per_segment)
            give_back_freed_memory()

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


def give_back_freed_memory() -> None:
    """Give back what glibc keeps of freed memory; elsewhere nothing.

    Making an epoch's order of millions of clips takes five times what stays of it, and glibc keeps blocks of such
    sizes for later once some were freed: for good, and in each of a node's ranks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
