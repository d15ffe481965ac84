"""Score clips by the laws of the toy world, without a learned metric.

A pixel is foreground if its brightest channel is closer to the disc than to the background, that is, if the disc covers
more than half of it. A frame's shape is correct if exactly one connected component is larger than a speck, and this one
is compact and has the area of the disc. Its position is the coverage-weighted centroid, its hue that of its mean color.

Motion is tested by the best fit of a reflected line, ``fold(x_0 + v k)``, along each axis to the track of the frames
with correct shape. The speed of the line must also match the world's.

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
"""Accepted area of a shape relative to the disc's."""
SPECK_PX = 3
"""Components of at most this many pixels are noise and are ignored."""
MAX_SPREAD = 1.5
"""Maximum second moment relative to a disc of the same area; 1.5 is an ellipse 2.6 times as long as wide."""
HUE_BAND = 1 / 8
"""Maximum distance of a hue from its class, in turns: half the distance between two classes."""
MIN_SATURATION = 0.4
"""Below this a color is gray and has no class."""
MAX_POSITION_ERROR_PX = 0.75
"""Maximum root-mean-square distance of a correct motion from the law."""
MAX_SPEED_ERROR_PX = 0.5
"""Maximum speed error of a correct motion, in pixels per frame."""
_THRESHOLD = (BACKGROUND[0] + 255) / 2
_CLASS_HUES = [colorsys.rgb_to_hsv(*(channel / 255 for channel in color))[0] for color in CLASS_COLORS]


@dataclass(frozen=True)
class FrameScore:
    """Shape found in one frame."""

    components: int
    """Connected foreground components larger than a speck."""
    area_px: float
    """Area of the largest component; 0 if there is none."""
    spread: float
    """Its second moment relative to that of a disc of the same area."""
    position: tuple[float, float]
    """(x, y) of its centroid; nan if there is none."""
    color_class: int | None
    """Class of its mean color; None if it matches no class."""

    @property
    def single_shape(self) -> bool:
        """Whether the frame shows one disc and nothing else."""
        low, high = AREA_BAND
        correct_area = low <= self.area_px / DISC_AREA_PX <= high
        return self.components == 1 and correct_area and self.spread <= MAX_SPREAD


@dataclass(frozen=True)
class ClipScore:
    """Score of one clip by the laws of the toy world."""

    frames: int
    color_right: bool
    """Whether more than half of the generated frames have the color of the expected class."""
    single_shape: float
    """Fraction of generated frames with one disc and nothing else."""
    color_constant: float
    """Fraction of generated frames in the most frequent color class of the clip."""
    area_variation: float
    """Standard deviation of the area over its mean; nan if a frame has no shape."""
    position_error_px: float
    """Root-mean-square distance of the track from the best reflected line; nan unless more than half of the frames
    have a correct shape."""
    speed_px: float
    """Speed of that line, in pixels per frame."""

    @property
    def position_right(self) -> bool:
        """Whether the motion follows the law; False without a track."""
        correct_speed = abs(self.speed_px - SPEED_PX) <= MAX_SPEED_ERROR_PX
        return self.position_error_px <= MAX_POSITION_ERROR_PX and correct_speed


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Number the 4-connected components of a mask.

    Args:
        mask: bool [H, W].

    Returns:
        Labels, int64 [H, W], 0 outside the mask and 1 to count inside; and the count.
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
    """Class with the hue nearest to a mean RGB color (0 to 255); None if it is gray or between two classes."""
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
    """Fit ``fold(x_0 + v k, low, high)`` to positions along one axis by grid search over both parameters.

    Args:
        numbers: int64 [m]: frame indices k.
        track: float64 [m]: position in each frame.
        low: Lower wall.
        high: Upper wall; the line moves at most half the span per frame, in either direction.

    Returns:
        Mean squared error of the best fit, in px^2, and its speed ``|v|`` in px per frame.
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
        class_label: Expected class; None accepts any class, as long as the frames agree on it.
        given_frames: Leading context frames. They count for the motion, but not for color and shape.

    Returns:
        The clip's score on each law.
    """
    frames = [score_frame(image) for image in video]
    made = frames[given_frames:]
    classes = [frame.color_class for frame in made if frame.color_class is not None]
    counts = np.bincount(classes, minlength=len(CLASS_COLORS))
    expected = int(counts.argmax()) if class_label is None else class_label
    areas = np.array([frame.area_px for frame in made])
    correct = np.array([frame.single_shape for frame in frames])
    error, speed = math.nan, math.nan
    if correct.mean() > 0.5:
        numbers, track = np.flatnonzero(correct), np.array([frame.position for frame in frames])[correct]
        walls = [(RADIUS_PX, video.shape[2 - axis] - RADIUS_PX) for axis in (0, 1)]
        fits = [fit_reflected_line(numbers, track[:, axis], *walls[axis]) for axis in (0, 1)]
        error = math.sqrt(fits[0][0] + fits[1][0])
        speed = math.hypot(fits[0][1], fits[1][1])
    return ClipScore(
        frames=len(frames),
        color_right=bool(counts[expected] > len(made) / 2),
        single_shape=float(correct[given_frames:].mean()) if made else 0.0,
        color_constant=float(counts.max() / max(1, len(made))),
        area_variation=float(areas.std() / areas.mean()) if len(areas) and areas.all() else math.nan,
        position_error_px=error,
        speed_px=speed,
    )


def class_of_first_frame(video: NDArray[np.uint8]) -> int | None:
    """Class of the shape in frame 0, which an image-to-video clip receives as context."""
    return score_frame(video[0]).color_class
