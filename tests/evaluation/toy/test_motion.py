import math

import numpy as np
import pytest

from flowception.evaluation.toy.motion import (
    HIGH_PX,
    LOW_PX,
    PIECE_FRAMES,
    drift_px_per_frame,
    piece_errors_px,
    trajectory_error_px,
)
from flowception.evaluation.toy.score import fit_reflected_line
from flowception.evaluation.toy.world import SPEED_PX, draw_track


def tracks_of(frames, count, seed=0):
    drawn = (draw_track(seed, number).positions for number in range(40 * count))
    return np.stack([track for track in drawn if len(track) == frames][:count])


@pytest.mark.parametrize("frames", [6, 10])
def test_lawful_tracks_have_no_error(frames):
    assert trajectory_error_px(tracks_of(frames, 60)).max() < 5e-3


def test_noise_leaves_the_residual_of_a_fit_of_three_parameters():
    tracks, deviation = tracks_of(10, 200), 0.05
    noisy = tracks + deviation * np.random.default_rng(0).standard_normal(tracks.shape)
    found = math.sqrt((trajectory_error_px(noisy) ** 2).mean())
    wanted = deviation * math.sqrt(2 * (2 * 10 - 3) / (2 * 10))
    assert found == pytest.approx(wanted, rel=0.05)


def test_never_above_the_distance_to_a_known_trajectory():
    tracks, shift = tracks_of(8, 60), np.random.default_rng(1).standard_normal((60, 8, 2))
    known = np.sqrt((shift**2).sum(axis=2).mean(axis=1))
    assert np.all(trajectory_error_px(tracks + shift) <= known + 5e-3)


def test_a_still_point_by_hand():
    """The nearest two-frame trajectory passes a still point with half a step on each side."""
    still = np.full((1, 2, 2), (LOW_PX + HIGH_PX) / 2)
    assert trajectory_error_px(still)[0] == pytest.approx(SPEED_PX / 2, abs=1e-3)


def test_a_wrong_speed_is_detected_that_the_free_fit_ignores():
    slow = np.stack([5.0 + 0.5 * np.arange(6), np.full(6, 8.0)], axis=1)
    free = fit_reflected_line(np.arange(6), slow[:, 0], LOW_PX, HIGH_PX)[0]
    assert free < 1e-6
    assert trajectory_error_px(slow[None])[0] > 0.3


def test_pieces_are_scored_separately():
    track = tracks_of(8, 1)[0]
    track[6] += 1.0  # in the last two pieces of four of the five
    other = tracks_of(10, 1)[0]
    errors, others = piece_errors_px([track, other])
    assert (len(errors), len(others)) == (8 - PIECE_FRAMES + 1, 10 - PIECE_FRAMES + 1)
    assert others.max() < 1e-2
    assert [len(found) for found in piece_errors_px([track, other], frames=6)] == [3, 5]
    assert piece_errors_px([]) == []
    assert errors[:3].max() < 1e-2
    assert errors[3:].min() > 0.1


def test_drift_is_the_slope_within_clips():
    """Only the rise of the error counts, not its level in a clip."""
    errors = [3.0 + 0.2 * np.arange(3), 1.0 + 0.2 * np.arange(7), np.array([9.0])]
    assert drift_px_per_frame(errors) == pytest.approx(0.2)
    assert math.isnan(drift_px_per_frame([np.array([1.0])]))
