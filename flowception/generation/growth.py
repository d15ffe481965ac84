"""Plot of how a clip grew: its frames against the clock, noise level by shade, insertions marked.

A frame's history follows from the clock at its insertion, because all frames advance with the clock: its time is
``min(1, clock - born_at)`` (docs/method.md), and its noise level is one minus the shifted time.

Shape legend: ``n`` frames of the finished clip, ``S`` evaluations of the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flowception.errors import ConfigError
from flowception.flow import Role, shift_time
from flowception.generation.video import refused_writes

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")

CONTEXT_COLOR = "#56b4e9"
START_COLOR = "#009e73"
INSERTION_COLOR = "#d55e00"
"""Okabe-Ito colors, distinguishable with red-green color blindness."""
NOISE_COLORS = LinearSegmentedColormap.from_list("noise_level", ["#1f2937", "#d5d9df"])
"""Clean is dark, noise is light. Grayscale, so that only brightness carries meaning."""


def noise_levels(
    born_at: Sequence[float], is_context: Sequence[bool], *, num_inference_steps: int, time_shift: float = 1.0
) -> NDArray[np.float64]:
    """Noise level of every frame at every step.

    Args:
        born_at: Clock at which each of the n frames was inserted (0 for context and start frames).
        is_context: Whether each frame was given.
        num_inference_steps: N, steps from noise to data of a frame.
        time_shift: The sampler's time shift s.

    Returns:
        Shape ``[n, S]``, column k at clock ``k / N``: 1 is noise, 0 is clean, NaN before the frame is inserted.
        S counts the states up to and including the one where every frame is clean.
    """
    birth = np.rint(np.asarray(born_at, dtype=np.float64) * num_inference_steps).astype(int)
    given = np.asarray(is_context, dtype=bool)
    last = num_inference_steps + int(max(birth[~given], default=0))
    age = (np.arange(last + 1)[None, :] - birth[:, None]) / num_inference_steps
    level = 1.0 - shift_time(torch.from_numpy(age.clip(0, 1)), time_shift).numpy()
    level = np.where(age < 0, np.nan, level)
    level[given] = 0.0
    return level


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Plot of one clip's growth, made by ``Clip.growth``.

    Shape legend: ``n`` latent frames of the finished clip.
    """

    born_at: Sequence[float]
    """Clock from 0 to 1 at which each of the n frames was inserted."""
    roles: Sequence[Role]
    """Role of each frame."""
    num_inference_steps: int
    """The sampler's N."""
    time_shift: float = 1.0
    """The sampler's time shift s."""
    title: str = ""
    """Title of the plot."""

    def save(self, path: str | Path) -> None:
        """Draw the plot and write it.

        Args:
            path: File to write: ``.png``, ``.svg`` or ``.pdf``. Its folder must exist.

        Raises:
            ConfigError: If the suffix is none of these.
            DataError: If it cannot be written there.
        """
        path = Path(path)
        if path.suffix.lower() not in PICTURE_SUFFIXES:
            raise ConfigError(f"the file name of a picture must end in .png, .svg or .pdf, got {path.name}")
        figure = self.figure()
        with refused_writes(path):
            figure.savefig(path)

    def figure(self) -> Figure:
        """The plot as a matplotlib figure, 8 inches wide."""
        return draw_growth(
            self.born_at,
            self.roles,
            num_inference_steps=self.num_inference_steps,
            time_shift=self.time_shift,
            title=self.title,
        )


def draw_growth(
    born_at: Sequence[float],
    roles: Sequence[int],
    *,
    num_inference_steps: int,
    time_shift: float = 1.0,
    title: str = "",
) -> Figure:
    """Draw one clip's growth; arguments as in ``Growth``."""
    number = len(born_at)
    context = [Role(role) in (Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE) for role in roles]
    level = noise_levels(born_at, context, num_inference_steps=num_inference_steps, time_shift=time_shift)
    figure = Figure(figsize=(8, 1.7 + 0.24 * number), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    half = 0.5 / num_inference_steps
    end = (level.shape[1] - 1) / num_inference_steps
    image = axes.imshow(
        level,
        cmap=NOISE_COLORS,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(-half, end + half, number - 0.5, -0.5),
    )
    _mark_births(axes, born_at, roles)
    for row in range(1, number):
        axes.axhline(row - 0.5, color="white", linewidth=1.5)
    last = max(1.0, *born_at)
    axes.axvline(last, color="white", linewidth=2)
    axes.axvline(last, color="black", linewidth=1, linestyle="--")
    axes.text(last, -0.6, "insertion ends", ha="center", va="bottom", fontsize=8)
    axes.set_xlim(-4 * half - 0.02, end + half)
    axes.set_xlabel("clock: a frame goes from noise to data in 1; blank means not inserted yet")
    axes.set_ylabel("frame of the finished clip")
    axes.set_yticks(range(number))
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.colorbar(image, ax=axes, label="noise level", fraction=0.05, pad=0.02)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _mark_births(axes: object, born_at: Sequence[float], roles: Sequence[int]) -> None:
    """Mark where each frame appears: square for context, circle for start, triangle for inserted frames."""
    kinds = (
        ("given (context)", (Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE), "s", CONTEXT_COLOR),
        ("start frame", (Role.START,), "o", START_COLOR),
        ("inserted", (Role.FREE,), ">", INSERTION_COLOR),
    )
    for label, members, marker, color in kinds:
        rows = [i for i, role in enumerate(roles) if Role(role) in members]
        if rows:
            places = [born_at[i] for i in rows]
            axes.scatter(  # type: ignore[attr-defined]
                places, rows, marker=marker, s=42, color=color, edgecolors="black", linewidths=0.7, zorder=3,
                label=f"{label}: {len(rows)}", clip_on=False,
            )  # fmt: skip
