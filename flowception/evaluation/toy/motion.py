"""Errors of position tracks with respect to the toy world's law of motion.

The law is a reflected line with speed ``SPEED_PX``. A track's error is its distance to the nearest trajectory of the
world, over all starting points and directions. For a given direction the two axes separate, so the search runs over
directions, with the best start per axis: first coarsely over all directions, then finely around the best few.

Drift is error that accumulates. Every ``PIECE_FRAMES`` consecutive frames are scored as a separate track, and drift is
the slope of that error over the index of the piece. It is fitted within clips, so that long and short clips can be
combined.

Units: pixels, frames. Shape legend: ``m`` tracks, ``n`` frames, ``A`` directions; last axis (x, y).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flowception.evaluation.toy.world import RADIUS_PX, SIZE_PX, SPEED_PX, fold

PIECE_FRAMES = 4
"""Frames per piece: eight coordinates to fit the three parameters of a trajectory (start and direction)."""
LOW_PX, HIGH_PX = RADIUS_PX, SIZE_PX - RADIUS_PX
_DIRECTIONS, _STARTS = 120, 25
_CANDIDATES = 3
_ROUNDS, _FINE = 4, 9
_CHUNK_TRACKS = 256


def trajectory_error_px(tracks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each track to the nearest trajectory of the world.

    Args:
        tracks: float64 [m, n, 2].

    Returns:
        float64 [m]: root-mean-square distance over the frames, in pixels.
    """
    parts = [_error_of_chunk(tracks[at : at + _CHUNK_TRACKS]) for at in range(0, len(tracks), _CHUNK_TRACKS)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _error_of_chunk(tracks: NDArray[np.float64]) -> NDArray[np.float64]:
    numbers = np.arange(tracks.shape[1])
    directions = 2 * math.pi * np.arange(_DIRECTIONS) / _DIRECTIONS
    starts = np.linspace(LOW_PX, HIGH_PX, _STARTS)
    coarse, best_start = zip(*(_coarse(tracks[:, :, axis], _speed(directions, axis), starts) for axis in (0, 1)))
    candidates = np.argsort(coarse[0] + coarse[1], axis=1)[:, :_CANDIDATES]
    direction = directions[candidates]
    start = [np.take_along_axis(best_start[axis], candidates, axis=1) for axis in (0, 1)]
    width, start_width = directions[1], starts[1] - starts[0]
    offsets = np.linspace(-1, 1, _FINE)
    for _ in range(_ROUNDS):
        tried = direction[..., None] + width * offsets
        errors, places = [], []
        for axis in (0, 1):
            near = start[axis][..., None] + start_width * offsets
            paths = fold(near[..., None, :, None] + _speed(tried, axis)[..., None, None] * numbers, LOW_PX, HIGH_PX)
            error = ((paths - tracks[:, None, None, None, :, axis]) ** 2).mean(axis=-1)
            errors.append(error.min(axis=-1))
            places.append(np.take_along_axis(near[..., None, :], error.argmin(axis=-1)[..., None], axis=-1)[..., 0])
        total = errors[0] + errors[1]
        chosen = total.argmin(axis=-1)[..., None]
        direction = np.take_along_axis(tried, chosen, axis=-1)[..., 0]
        start = [np.take_along_axis(place, chosen, axis=-1)[..., 0] for place in places]
        width, start_width = width * 2 / (_FINE - 1), start_width * 2 / (_FINE - 1)
    return np.sqrt(total.min(axis=(1, 2)))


def _speed(direction: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Speed along an axis, in pixels per frame."""
    return SPEED_PX * (np.cos(direction) if axis == 0 else np.sin(direction))


def _coarse(
    track: NDArray[np.float64], speeds: NDArray[np.float64], starts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean squared error [m, A] along one axis with the best start for each speed [A], and that start [m, A]."""
    frames = track.shape[1]
    paths = fold(starts[None, :, None] + speeds[:, None, None] * np.arange(frames), LOW_PX, HIGH_PX)
    flat = paths.reshape(-1, frames)
    errors = (flat**2).sum(axis=1) - 2 * track @ flat.T + (track**2).sum(axis=1)[:, None]
    errors = errors.reshape(len(track), len(speeds), len(starts)) / frames
    return errors.min(axis=2), starts[errors.argmin(axis=2)]


def piece_errors_px(tracks: Sequence[NDArray[np.float64]], frames: int = PIECE_FRAMES) -> list[NDArray[np.float64]]:
    """Error of every piece of consecutive frames, each scored as a separate track.

    Args:
        tracks: Tracks [n, 2] with n >= ``frames``.
        frames: Frames per piece.

    Returns:
        float64 [n - frames + 1] per track, in pixels.
    """
    pieces = [np.lib.stride_tricks.sliding_window_view(track, frames, axis=0).transpose(0, 2, 1) for track in tracks]
    if not pieces:
        return []
    errors = trajectory_error_px(np.concatenate(pieces))
    return np.split(errors, np.cumsum([len(piece) for piece in pieces])[:-1])


def drift_px_per_frame(errors: Sequence[NDArray[np.float64]]) -> float:
    """Least-squares slope of the piece errors over the piece index, with a separate intercept per clip.

    Args:
        errors: Piece errors from ``piece_errors_px``.

    Returns:
        Drift in pixels per frame; nan if no clip has two pieces.
    """
    product = square = 0.0
    for error in errors:
        place = np.arange(len(error)) - (len(error) - 1) / 2
        product += float((place * error).sum())
        square += float((place**2).sum())
    return product / square if square else math.nan
