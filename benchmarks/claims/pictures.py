"""Plot the results of the study, one plot per letter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.claims.arms import FLOWCEPTION, WINDOWS
from benchmarks.claims.page import SHOWN, mean_and_error, values_of
from benchmarks.claims.verdicts import METRICS, Results

PICTURES = {"a": "claims_insertion_order.png", "b": "claims_baselines.png", "c": "claims_attention_windows.png"}
_COLORS = ("#3b76af", "#d1495b")


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw a plot for each letter for which all results exist.

    Returns:
        Files by letter.
    """
    drawn = {}
    for letter, names in SHOWN.items():
        if not all(name in results for name in names):
            continue
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        axes = figure.subplots(1, len(METRICS))
        for panel, (metric, label) in zip(axes, METRICS.items()):
            if letter == "c":
                _draw_windows(panel, results, metric)
            else:
                _draw_arms(panel, results, names, metric)
            panel.set_title(label, fontsize=9)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        drawn[letter] = folder / PICTURES[letter]
        figure.savefig(drawn[letter], dpi=120)
    return drawn


def _draw_arms(panel: Axes, results: Results, names: Sequence[str], metric: str) -> None:
    """Plot bars of means, with a point per seed."""
    for place, name in enumerate(names):
        values = values_of(results, name, metric)
        panel.barh(place, mean_and_error(values)[0], color=_COLORS[name == FLOWCEPTION], alpha=0.5)
        panel.scatter(values, [place] * len(values), s=12, color="black", zorder=3)
    panel.set_yticks(range(len(names)), [name.replace("_at_equal_", "\nat equal ").replace("_", " ") for name in names])
    panel.invert_yaxis()


def _draw_windows(panel: Axes, results: Results, metric: str) -> None:
    """Plot means by window with standard errors, full attention last."""
    for color, name in zip(_COLORS[::-1], (FLOWCEPTION, "full_sequence")):
        found = [mean_and_error(values_of(results, f"{name}_window_{k}", metric)) for k in WINDOWS]
        found.append(mean_and_error(values_of(results, name, metric)))
        means, errors = zip(*found)
        panel.errorbar(
            range(len(found)), means, yerr=errors, color=color, marker="o", capsize=3, label=name.replace("_", " ")
        )
    panel.set_xticks(range(len(WINDOWS) + 1), [*(f"±{k}" for k in WINDOWS), "full"])
    panel.set_xlabel("frames attended to", fontsize=8)
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    panel.legend(fontsize=7, frameon=False)
