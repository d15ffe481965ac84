"""Planning steps in a background thread ahead of training, so that planning adds no time to a step."""

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
    """Plans the steps of an epoch, from a cursor on, into a queue. The last item is None or an exception."""

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
        except BaseException as error:  # raised again in the training thread
            self._put(error)

    def _put(self, item: Planned | BaseException | None) -> None:
        while not self.abandoned.is_set():
            try:
                self.queue.put(item, timeout=_POLL_S)
                break
            except Full:
                self._plan.plan_leftovers(self._first.epoch)


def steps_ahead(plan: Plan, first: Cursor, depth: int) -> Iterator[Planned]:
    """The steps of an epoch from a cursor on, planned in a background thread.

    While the queue is full, the thread also plans the leftover clips of the epoch's earlier segments, which a resumed
    run needs at the end of the epoch. After the last step it makes the order of the next epoch.

    Args:
        plan: The plan.
        first: The first step.
        depth: Steps to plan ahead.

    Yields:
        Each step and the cursor after it; for the last step, the first cursor of the next epoch.
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
