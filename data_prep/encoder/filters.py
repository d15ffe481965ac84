"""Filtering videos before decoding, by numbers such as length, size, motion, or any score.

A filter names a column of the manifest. If the manifest has no column ``duration_s``, ``height``, ``width``, or
``fps``, these are read from the headers of the video files, which opens every file once (``video_headers``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.encoder.video_headers import HeaderReader, VideoSource
from flowception.errors import ConfigError
from flowception.ranges import number

_HEADER_COLUMNS = ("duration_s", "height", "width", "fps")


@dataclass(kw_only=True)
class FilterRange:
    """Allowed range of a column's numbers; a video without a number is removed."""

    min: float | None = None
    """Smallest number kept; None is no bound."""
    max: float | None = None
    """Largest number kept; None is no bound."""

    def __post_init__(self) -> None:
        bound = number().or_null("no bound")
        bound.check("a filter's min", self.min)
        bound.check("a filter's max", self.max)
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError(f"a filter's min must be at most its max, got {self.min} and {self.max}")

    def keeps(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


@dataclass(frozen=True)
class FilterCount:
    """Number of videos that one filter removed from those that the previous filters kept."""

    column: str
    min: float | None
    max: float | None
    removed: int
    without_number: int
    """Removed videos that have no number in the column."""

    def describe(self) -> str:
        """A one-line summary."""
        named = (("at least", self.min), ("at most", self.max))
        bounds = [f"{word} {bound:g}" for word, bound in named if bound is not None]
        unknown = f" ({self.without_number} without a number)" if self.without_number else ""
        return f"{self.column} {' and '.join(bounds) or 'known'}: removed {self.removed}{unknown}"


def apply_filters(
    rows: Sequence[dict[str, Any]],
    videos: Sequence[VideoSource],
    filters: dict[str, FilterRange],
    headers: HeaderReader,
) -> tuple[list[int], list[FilterCount]]:
    """Choose the videos that pass all filters.

    Args:
        rows: Columns of each video.
        videos: Path of each video, and its frame rate if it is a folder of frames.
        filters: Ranges by column, applied in this order.
        headers: Reader of file headers, for columns that the manifest does not have.

    Returns:
        Positions of the videos kept, and counts for each filter.

    Raises:
        ConfigError: If no row has a filter's column.
    """
    kept, counts = list(range(len(rows))), []
    for column, wanted in filters.items():
        values = _column(column, rows, videos, kept, headers)
        passing = [k for k in kept if not math.isnan(values[k]) and wanted.keeps(values[k])]
        unknown = sum(math.isnan(values[k]) for k in kept)
        counts.append(FilterCount(column, wanted.min, wanted.max, len(kept) - len(passing), unknown))
        kept = passing
    return kept, counts


def _column(
    column: str,
    rows: Sequence[dict[str, Any]],
    videos: Sequence[VideoSource],
    kept: Sequence[int],
    headers: HeaderReader,
) -> dict[int, float]:
    """A column's numbers for some videos; NaN for videos without one."""
    if any(column in row for row in rows):
        return {k: _number(rows[k].get(column)) for k in kept}
    if column not in _HEADER_COLUMNS:
        numeric = sorted({name for row in rows[:100] for name, value in row.items() if not math.isnan(_number(value))})
        raise ConfigError(
            f"filters: no video has column {column!r}; the manifest's numeric columns are "
            f"{', '.join(numeric) or 'none'}, and file headers have {', '.join(_HEADER_COLUMNS)}"
        )
    found = headers.read([videos[k] for k in kept])
    return {k: math.nan if h is None else float(getattr(h, column)) for k, h in zip(kept, found, strict=True)}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
