"""Scores a clip by the toy world's laws; no learned metric.

A pixel is foreground where its brightest channel is past the middle between background and disc, which is where the
disc covers half of it. A frame is right in shape if exactly one connected component is larger than a speck, and that
one has the disc's area and is compact. Its place is the centroid, weighted by coverage; its hue is that of its mean
color.

The position law is tested by the best fit of a reflected line, ``fold(x_0 + v k)``, to the track of the frames that
are right in shape, along each axis; the line's speed must be the world's as well.

Shape legend: ``n`` frames, ``S`` pixels along each side.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowception.evaluation.toy.world import BACKGROUND, CLASS_COLORS, RADIUS_PX, SPEED_PX, fold

DISC_AREA_PX = math.pi * RADIUS_PX**2
AREA_BAND = (0.6, 1.5)
"""Area of a right shape relative to the disc's."""
SPECK_PX = 3
"""Components of at most so many pixels are noise and not counted."""
MAX_SPREAD = 1.5
"""Second moment relative to that of a disc of the same area; 1.5 is an ellipse 2.6 times as long as wide."""
HUE_BAND = 1 / 8
"""A hue is a class's if it is at most this part of the circle away: half the distance between two classes."""
MIN_SATURATION = 0.4
"""Less is gray, and no class's color."""
MAX_POSITION_ERROR_PX = 0.75
"""Root mean square distance from the law up to which a clip's motion counts as right."""
MAX_SPEED_ERROR_PX = 0.5
"""Pixels a frame by which the speed of a right motion may be off."""
_THRESHOLD = (BACKGROUND[0] + 255) / 2
_CLASS_HUES = [colorsys.rgb_to_hsv(*(channel / 255 for channel in color))[0] for color in CLASS_COLORS]


@dataclass(frozen=True)
class FrameScore:
    """One frame's shape."""

    components: int
    """Connected foreground components larger than a speck."""
    area_px: float
    """Area of the largest; 0 if there is none."""
    spread: float
    """Its second moment relative to a disc's of the same area."""
    position: tuple[float, float]
    """(x, y) of its centroid; nan if there is none."""
    color_class: int | None
    """Class of its mean color, None if it is no class's."""

    @property
    def single_shape(self) -> bool:
        """Whether the frame shows one disc and nothing else."""
        low, high = AREA_BAND
        right_area = low <= self.area_px / DISC_AREA_PX <= high
        return self.components == 1 and right_area and self.spread <= MAX_SPREAD


@dataclass(frozen=True)
class ClipScore:
    """One clip by the world's laws."""

    frames: int
    color_right: bool
    """The expected class's color in more than half of the frames."""
    single_shape: float
    """Share of the made frames with one disc and nothing else."""
    color_constant: float
    """Share of frames in the clip's most frequent color class."""
    area_variation: float
    """Standard deviation of the area over its mean; nan without a shape."""
    position_error_px: float
    """Root mean square distance of the track from the best reflected line; nan if half of the frames or more are
    not right in shape."""
    speed_px: float
    """Pixels a frame of that line."""

    @property
    def position_right(self) -> bool:
        """Whether the motion follows the law; False where there is no track."""
        right_speed = abs(self.speed_px - SPEED_PX) <= MAX_SPEED_ERROR_PX
        return self.position_error_px <= MAX_POSITION_ERROR_PX and right_speed


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Number the 4-connected components of a mask.

    Args:
        mask: bool [H, W].

    Returns:
        int64 [H, W], 0 outside the mask and 1 .. count inside; and the count.
    """
    labels = np.zeros(mask.shape, dtype=np.int64)
    count = 0
    for seed in zip(*np.nonzero(mask), strict=True):
        if labels[seed]:
            continue
        count += 1
        open_pixels = [seed]
        labels[seed] = count
        while open_pixels:
            row, column = open_pixels.pop()
            for place in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                inside = 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]
                if inside and mask[place] and not labels[place]:
                    labels[place] = count
                    open_pixels.append(place)
    return labels, count


def classify_color(color: NDArray[np.float64]) -> int | None:
    """Class of a mean RGB color (0 to 255): that of the nearest hue, None if it is gray or between two."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in color))
    distances = [abs((hue - class_hue + 0.5) % 1.0 - 0.5) for class_hue in _CLASS_HUES]
    nearest = int(np.argmin(distances))
    return nearest if saturation >= MIN_SATURATION and distances[nearest] <= HUE_BAND else None


def score_frame(image: NDArray[np.uint8]) -> FrameScore:
    """Find the shape in one frame.

    Args:
        image: uint8 [S, S, 3].
    """
    brightness = image.max(axis=-1).astype(np.float64)
    mask = brightness > _THRESHOLD
    if not mask.any():
        return FrameScore(0, 0.0, math.inf, (math.nan, math.nan), None)
    labels, _ = label_components(mask)
    areas = np.bincount(labels.ravel())[1:]
    shape = labels == 1 + int(np.argmax(areas))
    rim = np.pad(shape, 1)
    rim = rim[:-2, 1:-1] | rim[2:, 1:-1] | rim[1:-1, :-2] | rim[1:-1, 2:]
    cover = np.clip((brightness - BACKGROUND[0]) / (255.0 - BACKGROUND[0]), 0.0, 1.0) * (shape | rim)
    rows, columns = np.indices(shape.shape) + 0.5
    x, y = (float((cover * axis).sum() / cover.sum()) for axis in (columns, rows))
    area = float(shape.sum())
    moment = float(((columns - x) ** 2 + (rows - y) ** 2)[shape].mean())
    return FrameScore(
        components=int((areas > SPECK_PX).sum()),
        area_px=area,
        spread=moment / (area / (2.0 * math.pi)),
        position=(x, y),
        color_class=classify_color(image[shape].mean(axis=0)),
    )


def fit_reflected_line(
    numbers: NDArray[np.int64], track: NDArray[np.float64], low: float, high: float
) -> tuple[float, float]:
    """Fit ``fold(x_0 + v k, low, high)`` to positions along one axis, by search over both parameters.

    Args:
        numbers: int64 [m]: the frames' numbers k.
        track: float64 [m]: position in each.
        low: Lower wall.
        high: Upper wall; the line moves at most half the span a frame, in either direction.

    Returns:
        Mean squared error of the best fit, in px^2, and its speed ``|v|`` in px a frame.
    """
    span = high - low
    starts, speeds = np.linspace(low, high, 81), np.linspace(-span / 2, span / 2, 201)
    for _ in range(3):
        paths = starts[:, None, None] + speeds[None, :, None] * numbers
        errors = ((fold(paths, low, high) - track) ** 2).mean(axis=-1)
        best_start, best_speed = np.unravel_index(int(errors.argmin()), errors.shape)
        start, speed = starts[best_start], speeds[best_speed]
        starts = start + np.linspace(-1, 1, 21) * (starts[1] - starts[0])
        speeds = speed + np.linspace(-1, 1, 21) * (speeds[1] - speeds[0])
    return float(errors.min()), abs(float(speed))


def score_clip(video: NDArray[np.uint8], class_label: int | None, given_frames: int = 0) -> ClipScore:
    """Score one clip.

    Args:
        video: uint8 [n, S, S, 3].
        class_label: Class whose color is right; None takes any one class for right, as long as it is one.
        given_frames: Leading context frames. They belong to the motion, but earn nothing for color and shape.

    Returns:
        How the clip follows each law.
    """
    frames = [score_frame(image) for image in video]
    made = frames[given_frames:]
    classes = [frame.color_class for frame in made if frame.color_class is not None]
    counts = np.bincount(classes, minlength=len(CLASS_COLORS))
    expected = int(counts.argmax()) if class_label is None else class_label
    areas = np.array([frame.area_px for frame in made])
    right = np.array([frame.single_shape for frame in frames])
    error, speed = math.nan, math.nan
    if right.mean() > 0.5:
        numbers, track = np.flatnonzero(right), np.array([frame.position for frame in frames])[right]
        walls = [(RADIUS_PX, video.shape[2 - axis] - RADIUS_PX) for axis in (0, 1)]
        fits = [fit_reflected_line(numbers, track[:, axis], *walls[axis]) for axis in (0, 1)]
        error = math.sqrt(fits[0][0] + fits[1][0])
        speed = math.hypot(fits[0][1], fits[1][1])
    return ClipScore(
        frames=len(frames),
        color_right=bool(counts[expected] > len(made) / 2),
        single_shape=float(right[given_frames:].mean()) if made else 0.0,
        color_constant=float(counts.max() / max(1, len(made))),
        area_variation=float(areas.std() / areas.mean()) if len(areas) and areas.all() else math.nan,
        position_error_px=error,
        speed_px=speed,
    )


def class_of_first_frame(video: NDArray[np.uint8]) -> int | None:
    """Class of frame 0's shape: what an image-to-video clip was given."""
    return score_frame(video[0]).color_class
