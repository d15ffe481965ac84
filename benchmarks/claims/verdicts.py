"""Decide which claims hold, by a fixed rule.

A comparison is one metric of a baseline against Flowception, paired by seed. The difference is positive if Flowception
is better. The comparison holds if the entire 90 % confidence interval of the mean over seeds (Student's t) is above 0,
does not hold if the interval is below 0, and is not decided otherwise. A claim holds if all its comparisons hold, does
not hold if one of them does not, and is not decided otherwise. Of comparisons without any true difference, 5 % are
judged "holds" and 5 % "does not hold".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.claims.arms import EQUAL_FLOW_FRAMES, FLOWCEPTION, WINDOWS, result_name

HOLDS, DOES_NOT_HOLD, NOT_DECIDED = "holds", "does not hold", "not decided"
T_QUANTILE_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""0.95 quantile of Student's t with 1, 2, ... degrees of freedom."""
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Metrics by result name and seed."""
TRAJECTORY, DRIFT, FRECHET = "trajectory_error_px", "drift_px_per_frame", "frechet_px2"
METRICS = {TRAJECTORY: "trajectory error (px)", DRIFT: "drift (px per frame)", FRECHET: "Frechet distance (px²)"}
"""Metrics used to judge claims, with their titles. Smaller is better."""


@dataclass(frozen=True)
class Comparison:
    """One metric of a baseline against Flowception; smaller is better."""

    rival: str
    metric: str
    window_frames: int | None = None
    """If set, compare the log of the factor by which an attention window of this size increases the metric."""

    @property
    def words(self) -> str:
        """Description of the comparison."""
        of = f"{METRICS[self.metric]}: {self.rival} - {FLOWCEPTION}".replace("_", " ")
        return of if self.window_frames is None else f"log increase at ±{self.window_frames} frames, {of}"

    def difference(self, results: Results, seed: int) -> float:
        """The difference, positive if Flowception is better; nan if a metric is missing."""
        if self.window_frames is None:
            return _value(results, self.rival, seed, self.metric) - _value(results, FLOWCEPTION, seed, self.metric)
        rises = []
        for name in (self.rival, FLOWCEPTION):
            window = _value(results, f"{name}_window_{self.window_frames}", seed, self.metric)
            full = _value(results, name, seed, self.metric)
            rises.append(math.log(window / full) if min(window, full) > 0 else math.nan)
        return rises[0] - rises[1]

    def needs(self) -> list[str]:
        """Names of the results that are compared."""
        if self.window_frames is None:
            return [self.rival, FLOWCEPTION]
        return [
            f"{name}{window}" for name in (self.rival, FLOWCEPTION) for window in ("", f"_window_{self.window_frames}")
        ]


def _value(results: Results, name: str, seed: int, metric: str) -> float:
    value = results[name][seed][metric]
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the comparisons that test it."""

    letter: str
    words: str
    comparisons: tuple[Comparison, ...]


_ORDERS = ("left_to_right", "hierarchical", "random")
_AUTOREGRESSIVE = ("autoregressive_causal", "autoregressive_full")
_AUTOREGRESSIVE_BOTH = tuple(name for arm in _AUTOREGRESSIVE for name in (arm, result_name(arm, EQUAL_FLOW_FRAMES)))
CLAIMS = (
    Claim(
        "a",
        "Inserting frames where the model chooses yields better clips than inserting them in a prescribed order.",
        tuple(Comparison(order, metric) for order in _ORDERS for metric in (TRAJECTORY, FRECHET)),
    ),
    Claim(
        "b",
        "Flowception yields better clips than full-sequence flow matching.",
        tuple(Comparison("full_sequence", metric) for metric in (TRAJECTORY, FRECHET)),
    ),
    Claim(
        "b",
        "Flowception yields better clips than frame-by-frame autoregression.",
        tuple(Comparison(name, metric) for name in _AUTOREGRESSIVE_BOTH for metric in (TRAJECTORY, FRECHET)),
    ),
    Claim(
        "b",
        "Flowception drifts less along the clip than frame-by-frame autoregression.",
        tuple(Comparison(name, DRIFT) for name in _AUTOREGRESSIVE_BOTH),
    ),
    Claim(
        "c",
        "Attending only to nearby frames costs Flowception less quality than it costs full-sequence flow matching.",
        tuple(Comparison("full_sequence", metric, k) for k in WINDOWS for metric in (TRAJECTORY, FRECHET)),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """A comparison with its results."""

    words: str
    seeds: int
    mean: float | None
    """None if it cannot be computed."""
    standard_error: float | None
    low: float | None
    """Bounds of the 90 % interval."""
    high: float | None
    seeds_better: int
    """Number of seeds for which Flowception is better."""
    verdict: str


def judge(words: str, differences: Sequence[float]) -> Judged:
    """Apply the rule to one comparison.

    Args:
        words: Description of the comparison.
        differences: One per seed, positive if Flowception is better.

    Returns:
        The result; not decided with fewer than two seeds or a missing difference.
    """
    values = np.asarray(differences, dtype=np.float64)
    better = int((values > 0).sum())
    if len(values) < 2 or not np.isfinite(values).all():
        return Judged(words, len(values), None, None, None, None, better, NOT_DECIDED)
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    margin = T_QUANTILE_95[min(len(values) - 1, len(T_QUANTILE_95)) - 1] * error
    low, high = mean - margin, mean + margin
    verdict = HOLDS if low > 0 else DOES_NOT_HOLD if high < 0 else NOT_DECIDED
    return Judged(words, len(values), mean, error, low, high, better, verdict)


def verdict_of(verdicts: Sequence[str]) -> str:
    """A claim's verdict from those of its comparisons."""
    if DOES_NOT_HOLD in verdicts:
        return DOES_NOT_HOLD
    return HOLDS if verdicts and all(verdict == HOLDS for verdict in verdicts) else NOT_DECIDED


def judge_claims(results: Results, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Judge every claim for which all results exist.

    Args:
        results: Results of all arms.
        seeds: Seeds that every arm has.

    Returns:
        Letter, text, verdict and comparisons of each claim, JSON-serializable.
    """
    judged = []
    for claim in CLAIMS:
        if not all(name in results for comparison in claim.comparisons for name in comparison.needs()):
            continue
        found = [judge(c.words, [c.difference(results, seed) for seed in seeds]) for c in claim.comparisons]
        judged.append(
            {
                "letter": claim.letter,
                "claim": claim.words,
                "verdict": verdict_of([comparison.verdict for comparison in found]),
                "comparisons": [asdict(comparison) for comparison in found],
            }
        )
    return judged
