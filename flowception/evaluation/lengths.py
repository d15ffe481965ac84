"""Length laws: histograms of clip lengths and the distance between two of them.

A length law is a mapping from a number of frames to its probability; the distances work for outcomes of any kind, such
as the frames in each of several gaps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Outcome = TypeVar("Outcome", bound=Hashable)


def length_histogram(lengths: Iterable[int]) -> dict[int, float]:
    """Share of each length, sorted by length; empty for no clips."""
    counts = Counter(int(n) for n in lengths)
    total = sum(counts.values())
    return {n: counts[n] / total for n in sorted(counts)}


def total_variation(first: Mapping[Outcome, float], second: Mapping[Outcome, float]) -> float:
    """Half the summed absolute difference of two laws: 0 if equal, 1 if they share no outcome."""
    return 0.5 * sum(abs(first.get(n, 0.0) - second.get(n, 0.0)) for n in set(first) | set(second))


def sampling_total_variation(law: Mapping[Outcome, float], clips: int) -> float:
    """Total variation that ``clips`` independent draws from ``law`` itself show on average.

    A measured distance means nothing below this. Each share is off by ``sqrt(2 p (1 - p) / (pi clips))`` on average
    (mean absolute deviation of a binomial, normal approximation).

    Args:
        law: The true law.
        clips: Number of draws, at least 1.

    Returns:
        Expected total variation.
    """
    return 0.5 * sum(math.sqrt(2.0 * p * (1.0 - p) / (math.pi * clips)) for p in law.values())
