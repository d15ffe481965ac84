"""Time limits of checks, so that all of them end in time and the last ones get their reserved time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.gpu.outcome import Check


class Budget:
    """Time budget of all checks together, starting at construction."""

    def __init__(self, total_s: float, patience: float, clock: Callable[[], float]) -> None:
        """Start the clock.

        Args:
            total_s: Seconds for all checks.
            patience: Factor for all limits.
            clock: Monotonic seconds.
        """
        self.total_s = total_s * patience
        self._patience, self._clock, self._started = patience, clock, clock()

    @property
    def used_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def limit_s(self, check: Check, later: Sequence[Check]) -> float:
        """Seconds that a check may take: its limit, or less to keep the reserved time of later checks.

        Args:
            check: The next check.
            later: The checks after it.

        Returns:
            The limit; 0 or less if no time is left.
        """
        reserved_s = sum(other.reserved_s for other in later)
        left_s = self.total_s - self.used_s
        return min(check.limit_s * self._patience, left_s - reserved_s * self._patience)
