"""Length laws: histograms of clip lengths and the distance between two of them.

A length law maps a number of frames to its probability. The distances work for any hashable outcome, such as the
numbers of frames in several gaps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Outcome = TypeVar("Outcome", bound=Hashable)


def length_histogram(lengths: Iterable[int]) -> dict[int, float]:
    """Fraction of clips of each length, sorted by length; empty for no clips."""
    counts = Counter(int(n) for n in lengths)
    total = sum(counts.values())
    return {n: counts[n] / total for n in sorted(counts)}


def total_variation(first: Mapping[Outcome, float], second: Mapping[Outcome, float]) -> float:
    """Total variation distance: 0 for equal laws, 1 for laws without a common outcome."""
    return 0.5 * sum(abs(first.get(n, 0.0) - second.get(n, 0.0)) for n in set(first) | set(second))


def sampling_total_variation(law: Mapping[Outcome, float], clips: int) -> float:
    """Expected total variation between ``law`` and ``clips`` independent draws from it: the noise floor.

    The average error of each fraction is ``sqrt(2 p (1 - p) / (pi clips))`` (mean absolute deviation of a binomial,
    normal approximation).

    Args:
        law: The true law.
        clips: Number of draws, at least 1.

    Returns:
        Expected total variation.
    """
    return 0.5 * sum(math.sqrt(2.0 * p * (1.0 - p) / (math.pi * clips)) for p in law.values())
