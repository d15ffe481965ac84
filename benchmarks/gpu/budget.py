"""How long each check may take, so that all of them end in time and the last ones get their share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.gpu.outcome import Check


class Budget:
    """Seconds that all checks together may take, from when this is made."""

    def __init__(self, total_s: float, patience: float, clock: Callable[[], float]) -> None:
        """Begin to count.

        Args:
            total_s: For everything.
            patience: How many times as long everything may take.
            clock: Seconds that only grow.
        """
        self.total_s = total_s * patience
        self._patience, self._clock, self._began = patience, clock, clock()

    @property
    def used_s(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    def limit_s(self, check: Check, later: Sequence[Check]) -> float:
        """Seconds that a check may take: its own limit, or less where those after it would not get what is theirs.

        Args:
            check: The next one.
            later: Those that are to be run after it.

        Returns:
            The limit; 0 or less where no time is left for it.
        """
        reserved_s = sum(other.reserved_s for other in later)
        left_s = self.total_s - self.used_s
        return min(check.limit_s * self._patience, left_s - reserved_s * self._patience)
