"""Training curves from ``metrics.jsonl``: ``flowception plot RUN``.

Missing values are not interpolated. Unreadable lines, values that are not finite, and missing steps are counted and
reported.

Shape legend: ``S`` steps that have a value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flowception.errors import RunDirectoryError

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""The Okabe-Ito palette."""
_COLUMNS = 3
_OVER = " over "
_MEAN_SHARE = 50
"""A moving mean averages 1/50 of a curve's points."""


@dataclass(frozen=True)
class Curve:
    """One metric over steps."""

    steps: NDArray[np.float64]
    """[S]."""
    values: NDArray[np.float64]
    """[S], finite."""


@dataclass
class Metrics:
    """Contents of ``metrics.jsonl``."""

    curves: dict[str, Curve]
    last_step: int
    notes: list[str] = field(default_factory=list)
    """What was skipped, as text for the user."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    unit: str
    names: tuple[str, ...]
    """Metric names; a trailing ``*`` matches any suffix."""
    log: bool = False


PANELS = (
    Panel("loss", "weighted sum", ("loss",)),
    Panel("loss by term", "mean", ("loss/velocity", "loss/insertion")),
    Panel("velocity loss by frame time (0 noise, 1 data)", "mean squared error", ("loss/velocity/*",)),
    Panel("held-out loss of the EMA", "mean", ("validation/loss", "validation/loss/velocity", "validation/velocity/*")),
    Panel("gradient norm before clipping", "", ("grad_norm",), log=True),
    Panel("learning rate", "", ("lr",)),
    Panel("insertion rate, predicted over true", "1 is calibrated", ("rate/predicted over rate/true",)),
    Panel("attention relative to full-sequence", "ratio", ("attention_ratio", "attention_ratio_expected")),
    Panel("pack fill", "share of tokens", ("fill",)),
    Panel("FLOPs of the largest pack over the mean", "minus 1", ("flops_imbalance",)),
    Panel("speed", "tokens/s", ("tokens_per_s",)),
    Panel("model FLOPs utilization", "share of peak", ("mfu",)),
    Panel("waiting for data", "share of step time", ("data_wait_s over step_s",)),
    Panel("peak memory of any rank", "GiB", ("peak_memory_gib",)),
    Panel("skipped steps and bad clips", "count", ("skipped_steps", "bad_clips")),
)
RATIOS = (("rate/predicted", "rate/true"), ("data_wait_s", "step_s"))
"""Plotted as ``A over B``: the ratio of the moving means, so that steps with few sites have little weight."""


def read_metrics(run_dir: Path) -> Metrics:
    """Read a run's metrics.

    Args:
        run_dir: The run directory.

    Returns:
        A curve for every metric that has a value.

    Raises:
        RunDirectoryError: If there is no ``metrics.jsonl``, or none of its lines is readable.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise RunDirectoryError(f"{path} does not exist; give the run_dir of a run that has completed a step")
    points: dict[str, dict[int, float]] = {}
    torn, not_finite, seen = 0, dict[str, int](), set[int]()
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            torn += 1
            continue
        seen.add(step)
        for name, value in entry.items():
            if isinstance(value, int | float) and np.isfinite(value):
                points.setdefault(name, {})[step] = float(value)
            else:
                not_finite[name] = not_finite.get(name, 0) + 1
    if not seen:
        raise RunDirectoryError(
            f"{path} has no readable line ({torn} are damaged); wait until the run completes a step"
        )
    notes = [f"skipped {torn} unreadable lines of {path.name}"] if torn else []
    notes += [f"{name} is not a finite number in {count} steps" for name, count in sorted(not_finite.items())]
    gaps = max(seen) - min(seen) + 1 - len(seen)
    notes += [f"{gaps} steps between {min(seen)} and {max(seen)} are missing"] if gaps else []
    return Metrics({name: _curve(found) for name, found in points.items()}, max(seen), notes)


def _curve(points: dict[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps, dtype=float), np.array([points[step] for step in steps]))


def moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centered mean over up to ``window`` neighbors, fewer at the ends; [S] for values [S]."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low = np.maximum(place - window // 2, 0)
    high = np.minimum(place + (window - 1) // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _window(curve: Curve) -> int:
    return max(1, len(curve.values) // _MEAN_SHARE)


def add_ratios(metrics: Metrics) -> None:
    """Add ``A over B`` for each of ``RATIOS``, at the steps that have both."""
    for above, below in RATIOS:
        if above not in metrics.curves or below not in metrics.curves:
            continue
        first, second = metrics.curves[above], metrics.curves[below]
        steps, here, there = np.intersect1d(first.steps, second.steps, return_indices=True)
        common = Curve(steps, second.values[there])
        divisor = moving_mean(common.values, _window(common))
        ratio = np.divide(moving_mean(first.values[here], _window(common)), divisor, where=divisor > 0,
                          out=np.full(len(steps), np.nan))  # fmt: skip
        known = np.isfinite(ratio)
        if known.any():
            metrics.curves[f"{above}{_OVER}{below}"] = Curve(steps[known], ratio[known])


def names_of(panel: Panel, known: Sequence[str]) -> list[str]:
    """The known metrics of a panel, in its order."""
    return [
        name
        for pattern in panel.names
        for name in sorted(known)
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))
    ]


def draw_curves(run_dir: Path, path: Path) -> list[str]:
    """Plot all panels that have data.

    Args:
        run_dir: The run directory.
        path: Output file (png, svg or pdf by its suffix).

    Returns:
        What was skipped or missing, as text for the user.

    Raises:
        RunDirectoryError: If there is nothing to plot, or the file cannot be written.
    """
    metrics = read_metrics(run_dir)
    add_ratios(metrics)
    found = [(panel, names) for panel in PANELS if (names := names_of(panel, list(metrics.curves)))]
    absent = [panel.title for panel in PANELS if not names_of(panel, list(metrics.curves))]
    if not found:
        raise RunDirectoryError(
            f"{run_dir / 'metrics.jsonl'} has none of the metrics that are plotted; give a training run"
        )
    rows = -(-len(found) // _COLUMNS)
    figure = Figure(figsize=(5 * _COLUMNS, 2.9 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{run_dir.resolve().name}, {metrics.last_step} steps", parse_math=False)
    for place, (panel, names) in enumerate(found):
        _draw_panel(figure.add_subplot(rows, _COLUMNS, place + 1), panel, names, metrics)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"cannot write {path} ({error}); choose another --out FILE, such as a.png") from error
    return metrics.notes + ([f"not in metrics.jsonl: {', '.join(absent)}"] if absent else [])


def _draw_panel(axes: Axes, panel: Panel, names: Sequence[str], metrics: Metrics) -> None:
    for number, name in enumerate(names):
        curve, color = metrics.curves[name], COLORS[number % len(COLORS)]
        few = len(curve.values) < 2
        window = 1 if _OVER in name else _window(curve)  # a ratio is already one of moving means
        axes.plot(curve.steps, curve.values, color=color, alpha=0.3 if window > 1 else 1, linewidth=1,
                  marker="o" if few else None, label=None if window > 1 else name)  # fmt: skip
        if window > 1:
            axes.plot(curve.steps, moving_mean(curve.values, window), color=color, linewidth=1.5, label=name)
    if panel.log and all((metrics.curves[name].values > 0).all() for name in names):
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        axes.legend(fontsize=7, frameon=False)
