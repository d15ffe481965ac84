"""Planning steps in a thread, ahead of the one that trains, so that planning costs a step no time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Full, Queue

from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor, StepPlan

_POLL_S = 0.2

Planned = tuple[StepPlan, Cursor]
"""A step and the cursor after it."""


class _PlanningThread(threading.Thread):
    """Plans the steps of an epoch from a cursor on into a queue; the last item is None, or what went wrong."""

    def __init__(self, plan: Plan, first: Cursor, depth: int) -> None:
        super().__init__(name="plan ahead", daemon=True)
        self._plan, self._first = plan, first
        self.queue: Queue[Planned | BaseException | None] = Queue(maxsize=depth)
        self.abandoned = threading.Event()

    def run(self) -> None:
        cursor = self._first
        try:
            while cursor.epoch == self._first.epoch and not self.abandoned.is_set():
                step = self._plan.step(cursor)
                cursor = self._plan.next(cursor)
                self._put((step, cursor))
            if not self.abandoned.is_set():
                self._plan.step(cursor)  # the next epoch's order takes a second or two for millions of clips
            self._put(None)
        except BaseException as error:  # raised again in the thread that trains
            self._put(error)

    def _put(self, item: Planned | BaseException | None) -> None:
        while not self.abandoned.is_set():
            try:
                self.queue.put(item, timeout=_POLL_S)
                break
            except Full:
                self._plan.plan_left_over(self._first.epoch)


def steps_ahead(plan: Plan, first: Cursor, depth: int) -> Iterator[Planned]:
    """The steps of an epoch from a cursor on, planned in a thread.

    While it is ahead, the thread also finds out what the epoch's earlier segments leave over, which a run that resumed
    behind them needs at the epoch's end, and at the end makes the next epoch's order.

    Args:
        plan: The plan.
        first: The first step.
        depth: Steps to be ahead by.

    Yields:
        Each step and the cursor after it, which for the last is the next epoch's first.
    """
    thread = _PlanningThread(plan, first, depth)
    thread.start()
    try:
        while (item := thread.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        thread.abandoned.set()
