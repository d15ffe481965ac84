"""Summary statistics of a set of toy clips, and the quality that the demo promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flowception.evaluation.lengths import length_histogram, sampling_total_variation, total_variation
from flowception.evaluation.toy.score import ClipScore
from flowception.evaluation.toy.world import LENGTH_LAW

PROMISED_COLOR_RIGHT = 0.90
PROMISED_SINGLE_SHAPE = 0.70
PROMISED_TIMES = 3.0
"""A promise also requires this multiple of the untrained model's fraction ..."""
PROMISED_FAILURE_SHARE = 1 / 8
"""... or a failure fraction of at most this part of the untrained model's."""


@dataclass(frozen=True)
class SetSummary:
    """Scores of a set of clips. Fractions are of clips, except ``single_shape``, which is of frames."""

    clips: int
    frames: int
    color_right: float
    single_shape: float
    color_constant: float
    position_right: float
    area_variation: float
    """Median over the clips with a shape in every frame; nan if there are none."""
    position_error_px: float
    """Median over the clips with a track; nan if there are none."""
    speed_px: float
    """Median over the clips with a track, in pixels per frame; nan if there are none."""
    mean_frames: float
    length_total_variation: float
    """Total variation between the lengths of the set and the law."""
    length_total_variation_of_sampling: float
    """Expected value for as many clips drawn from the law itself."""
    length_histogram: dict[int, float] = field(default_factory=dict)


def summarize(scores: Sequence[ClipScore]) -> SetSummary:
    """Summarize the scores of one or more clips."""
    histogram = length_histogram(score.frames for score in scores)
    frames = sum(score.frames for score in scores)
    return SetSummary(
        clips=len(scores),
        frames=frames,
        color_right=float(np.mean([score.color_right for score in scores])),
        single_shape=sum(score.single_shape * score.frames for score in scores) / frames,
        color_constant=float(np.mean([score.color_constant for score in scores])),
        position_right=float(np.mean([score.position_right for score in scores])),
        area_variation=_median([score.area_variation for score in scores]),
        position_error_px=_median([score.position_error_px for score in scores]),
        speed_px=_median([score.speed_px for score in scores]),
        mean_frames=frames / len(scores),
        length_total_variation=total_variation(histogram, LENGTH_LAW),
        length_total_variation_of_sampling=sampling_total_variation(LENGTH_LAW, len(scores)),
        length_histogram=histogram,
    )


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


def promises(generated: SetSummary, untrained: SetSummary) -> list[tuple[str, bool]]:
    """Check the promises of the demo.

    Args:
        generated: Summary of the trained model's clips.
        untrained: Summary of the untrained model's clips.

    Returns:
        A description of each promise, and whether it holds.
    """
    found = []
    for name, least in (("color_right", PROMISED_COLOR_RIGHT), ("single_shape", PROMISED_SINGLE_SHAPE)):
        share, before = float(getattr(generated, name)), float(getattr(untrained, name))
        words = name.replace("_", " ")
        found.append((f"{words} {share:.1%}, promised at least {least:.0%}", share >= least))
        better = share >= PROMISED_TIMES * before or 1.0 - share <= PROMISED_FAILURE_SHARE * (1.0 - before)
        found.append((f"{words} {PROMISED_TIMES:.0f} x the untrained {before:.1%}, or its failure / 8", better))
    return found
