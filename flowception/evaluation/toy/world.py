"""The toy world: one disc that moves at constant speed and bounces off the walls, in one of four colors.

Laws, exact enough to score a clip without a learned metric (``toy.score``):

* **Color**: constant, given by the class of the clip. The four hues are 90 degrees apart and fully bright.
* **Shape**: one disc of radius ``RADIUS_PX``, always fully inside the frame.
* **Position**: the center moves ``SPEED_PX`` per frame in a random direction and is reflected at the walls. Along each
  axis that is a triangle wave: ``x_k = fold(x_0 + v k)`` between ``RADIUS_PX`` and ``size - RADIUS_PX``.
* **Length**: ``LENGTH_LAW``.
* **Caption**: color and initial direction of the disc, ``a red disc moving left and up``.

Units: pixels, with the center of pixel (0, 0) at (0.5, 0.5); one frame is one unit of time.
Shape legend: ``n`` frames, ``S`` pixels along each side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from flowception.rng import Stream, uniforms

CLASS_NAMES = ("red", "lime", "cyan", "violet")
CLASS_COLORS = ((255, 40, 40), (148, 255, 40), (40, 255, 255), (148, 40, 255))
"""RGB of each class: hues 0, 90, 180 and 270 degrees."""
BACKGROUND = (24, 24, 24)
SIZE_PX = 16
RADIUS_PX = 4.0
SPEED_PX = 1.5
"""Pixels per frame."""
LENGTH_LAW = {6: 0.30, 7: 0.10, 8: 0.20, 9: 0.10, 10: 0.30}
"""Probability of each number of frames. Two peaks expose a model that has learned only the mean."""
FPS = 8

Number = TypeVar("Number", float, NDArray[np.float64])


@dataclass(frozen=True)
class ToyClip:
    """One clip of the world."""

    class_label: int
    """Index into ``CLASS_NAMES``."""
    positions: NDArray[np.float64]
    """float64 [n, 2]: (x, y) of the disc's center."""
    video: NDArray[np.uint8]
    """uint8 [n, S, S, 3]."""
    velocity: NDArray[np.float64]
    """float64 [2]: pixels per frame along (x, y) at the first frame."""

    @property
    def caption(self) -> str:
        """Color, and direction before the first wall."""
        return caption_of(self.class_label, bool(self.velocity[0] < 0), bool(self.velocity[1] < 0))


def caption_of(class_label: int, left: bool, up: bool) -> str:
    """Caption of a disc, by class and initial direction."""
    across, along = "left" if left else "right", "up" if up else "down"
    return f"a {CLASS_NAMES[class_label]} disc moving {across} and {along}"


def fold(position: Number, low: float, high: float) -> Number:
    """Reflect a free position into [low, high]: a triangle wave of period ``2 (high - low)``."""
    span = high - low
    return low + span - abs((position - low) % (2.0 * span) - span)


def render_disc(position: NDArray[np.float64], color: tuple[int, int, int], size: int = SIZE_PX) -> NDArray[np.uint8]:
    """Render one anti-aliased disc on the background.

    Args:
        position: (x, y) of the center.
        color: RGB of the disc.
        size: S.

    Returns:
        uint8 [S, S, 3].
    """
    centers = np.arange(size) + 0.5
    distance = np.hypot(centers[None, :] - position[0], centers[:, None] - position[1])
    cover = np.clip(RADIUS_PX + 0.5 - distance, 0.0, 1.0)[..., None]
    background = np.asarray(BACKGROUND, dtype=np.float64)
    return np.round(background + cover * (np.asarray(color) - background)).astype(np.uint8)


class Track(NamedTuple):
    """A clip before it is rendered."""

    class_label: int
    positions: NDArray[np.float64]
    """float64 [n, 2]: (x, y) of the disc's center."""
    velocity: NDArray[np.float64]
    """float64 [2]: pixels per frame along (x, y) at the first frame."""


def draw_track(seed: int, number: int, size: int = SIZE_PX) -> Track:
    """Draw the class and the motion of clip ``number`` of the world of ``seed``.

    Args:
        seed: Seed of the set.
        number: Index of the clip.
        size: Side S in pixels.

    Returns:
        The track; independent of call order.
    """
    (u_class, u_length), (u_x, u_y), (u_angle, _) = uniforms(seed, Stream.TOY_WORLD, clip=number, frame=np.arange(3))
    class_label = int(u_class * len(CLASS_NAMES))
    cumulative = np.cumsum(list(LENGTH_LAW.values()))
    frames = list(LENGTH_LAW)[min(int(np.searchsorted(cumulative, u_length, side="right")), len(LENGTH_LAW) - 1)]
    low, high = RADIUS_PX, size - RADIUS_PX
    start = low + (high - low) * np.array([u_x, u_y])
    velocity = SPEED_PX * np.array([math.cos(2 * math.pi * u_angle), math.sin(2 * math.pi * u_angle)])
    positions = fold(start[None, :] + np.arange(frames)[:, None] * velocity[None, :], low, high)
    return Track(class_label, positions, velocity)


def draw_clip(seed: int, number: int, size: int = SIZE_PX) -> ToyClip:
    """Draw clip ``number`` of the world of ``seed``: its ``draw_track``, rendered.

    Args:
        seed: Seed of the set.
        number: Index of the clip.
        size: Side S in pixels.

    Returns:
        The clip with its labels.
    """
    track = draw_track(seed, number, size)
    video = np.stack([render_disc(position, CLASS_COLORS[track.class_label], size) for position in track.positions])
    return ToyClip(**track._asdict(), video=video)
