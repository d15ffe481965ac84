"""Insertion rules of the sampler: from rates to the number of frames inserted to the right of each frame in one step.

A rate is the expected number of frames still missing to the right of a frame. ``p`` is the probability that a missing
frame appears in this step (``InsertionSchedule.appearance_probability``). All rules have mean ``rate * p``:

* ``bernoulli`` (the paper's): one frame with probability ``min(1, rate * p)``.
* ``poisson``: ``Poisson(rate * p)`` frames.
* ``thinning`` (the default): turn the rates into integer counts by systematic sampling (Madow 1949) with one uniform
  U per clip, ``c_i = floor(S_i + U) - floor(S_{i-1} + U)``, where S is the cumulative sum of the clip's rates. Then
  insert ``Binomial(c_i, p)`` frames. Each count, and their total, is its expectation rounded up or down, so the rule
  adds no noise beyond that of the data.

Rules are pure functions of their uniforms, and a clip's counts depend only on its own sites.

Shape legend: ``B`` clips, ``F`` frames of all clips, concatenated: clip b is ``cu_frames[b] : cu_frames[b + 1]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

InsertionRule = Callable[[Floats, Counts, NDArray[np.bool_], float, Floats], Counts]
"""``(rates [F], cu_frames [B + 1], may_insert [F], p, uniforms [F, 2]) -> counts [F]``, zero where not ``may_insert``.

Each site uses column 1 of its uniforms; each clip uses column 0 of its first frame."""


def _invert(uniforms: Floats, log_mass: Floats, step: Callable[[int], Floats], last: int) -> Counts:
    """Smallest k with ``uniforms < P(count <= k)``, by accumulating the probability mass.

    Args:
        uniforms: [K].
        log_mass: [K], log P(count = 0).
        step: k -> log P(count = k + 1) - log P(count = k), [K].
        last: Largest count considered.
    """
    cumulative, counts = np.exp(log_mass), np.zeros(len(uniforms), dtype=np.int64)
    for k in range(last):
        beyond = uniforms >= cumulative
        if not beyond.any():
            break
        counts += beyond
        log_mass = log_mass + step(k)
        cumulative = cumulative + np.exp(log_mass)
    return counts


def poisson_quantile(mean: Floats, uniforms: Floats) -> Counts:
    """Poisson counts by inversion.

    Args:
        mean: [K], at least 0.
        uniforms: [K], in [0, 1).

    Returns:
        [K].
    """
    with np.errstate(divide="ignore"):
        log_mean = np.log(mean)
    largest = float(mean.max(initial=0.0))
    last = math.ceil(largest + 12 * math.sqrt(largest) + 40)
    return _invert(uniforms, -mean, lambda k: log_mean - math.log(k + 1), last)


def binomial_quantile(trials: Counts, p: float, uniforms: Floats) -> Counts:
    """Binomial counts by inversion.

    Args:
        trials: [K], at least 0.
        p: Probability of success, in [0, 1].
        uniforms: [K], in [0, 1).

    Returns:
        [K], each at most its ``trials``.
    """
    if p <= 0 or p >= 1:
        return trials.copy() if p >= 1 else np.zeros_like(trials)
    log_odds = math.log(p) - math.log1p(-p)

    def step(k: int) -> Floats:
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(trials - k, 0) / (k + 1)) + log_odds

    counts = _invert(uniforms, (trials * math.log1p(-p)).astype(np.float64), step, int(trials.max(initial=0)))
    return np.minimum(counts, trials)


def bernoulli(rates: Floats, cu_frames: Counts, may_insert: NDArray[np.bool_], p: float, uniforms: Floats) -> Counts:
    """At most one new frame to the right of each frame (the paper's rule). Arguments as in ``InsertionRule``."""
    return (may_insert & (uniforms[:, 1] < rates * p)).astype(np.int64)


def poisson(rates: Floats, cu_frames: Counts, may_insert: NDArray[np.bool_], p: float, uniforms: Floats) -> Counts:
    """A Poisson number of new frames to the right of each frame. Arguments as in ``InsertionRule``."""
    counts = np.zeros(len(rates), dtype=np.int64)
    counts[may_insert] = poisson_quantile(rates[may_insert] * p, uniforms[may_insert, 1])
    return counts


def whole_counts(rates: Floats, cu_frames: Counts, may_insert: NDArray[np.bool_], clip_uniforms: Floats) -> Counts:
    """Turn rates into integer counts with the same mean, by systematic sampling.

    Args:
        rates: [F].
        cu_frames: [B + 1].
        may_insert: bool [F].
        clip_uniforms: [B], one per clip.

    Returns:
        [F]: each rate rounded up or down. Each clip's total is also its expectation rounded up or down.
    """
    clip_frames = np.diff(cu_frames)
    clip = np.repeat(np.arange(len(clip_frames)), clip_frames)
    rank = np.arange(len(rates)) - cu_frames[clip]
    dense = np.zeros((len(clip_frames), int(clip_frames.max(initial=0)) + 1))
    dense[clip, rank + 1] = np.where(may_insert, rates, 0.0)
    # One cumulative sum per clip, not one over the batch: rounding must not depend on other clips.
    level = np.floor(np.cumsum(dense, axis=1) + clip_uniforms[:, None])
    return np.diff(level, axis=1)[clip, rank].astype(np.int64)


def thinning(rates: Floats, cu_frames: Counts, may_insert: NDArray[np.bool_], p: float, uniforms: Floats) -> Counts:
    """Draw the missing counts, then insert each frame with probability ``p``. Arguments as in ``InsertionRule``."""
    counts = whole_counts(rates, cu_frames, may_insert, uniforms[cu_frames[:-1], 0])
    sites = counts > 0
    counts[sites] = binomial_quantile(counts[sites], p, uniforms[sites, 1])
    return counts


INSERTION_RULES: dict[str, InsertionRule] = {"thinning": thinning, "bernoulli": bernoulli, "poisson": poisson}
