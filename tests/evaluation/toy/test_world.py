import colorsys

import numpy as np
import pytest

from flowception.evaluation.lengths import length_histogram, sampling_total_variation, total_variation
from flowception.evaluation.toy.world import (
    BACKGROUND,
    CLASS_COLORS,
    CLASS_NAMES,
    LENGTH_LAW,
    RADIUS_PX,
    SIZE_PX,
    SPEED_PX,
    draw_clip,
    fold,
    render_disc,
)


def test_fold_is_a_reflection_step_by_step():
    """Compared with a ball that moves in tiny steps and turns at the walls."""
    low, high, x, v, dt = 3.0, 13.0, 5.0, 1.5, 1e-3
    path = [x]
    for _ in range(40):
        for _ in range(1000):
            x += v * dt
            if not low <= x <= high:
                x, v = 2 * (high if x > high else low) - x, -v
        path.append(x)
    np.testing.assert_allclose(fold(5.0 + 1.5 * np.arange(41), low, high), path, atol=1e-8)


def test_disc_area_and_position():
    position = np.array([7.3, 9.6])
    image = render_disc(position, (255, 24, 24))
    cover = (image[..., 0].astype(float) - BACKGROUND[0]) / (255 - BACKGROUND[0])
    assert cover.sum() == pytest.approx(np.pi * RADIUS_PX**2, rel=0.03)
    grid = np.arange(SIZE_PX) + 0.5
    assert (cover * grid[None, :]).sum() / cover.sum() == pytest.approx(7.3, abs=0.02)
    assert (cover * grid[:, None]).sum() / cover.sum() == pytest.approx(9.6, abs=0.02)


def test_hues_are_ninety_degrees_apart_and_bright():
    hues = [colorsys.rgb_to_hsv(*(c / 255 for c in color))[0] * 360 for color in CLASS_COLORS]
    np.testing.assert_allclose(hues, [0, 90, 180, 270], atol=1)
    assert {max(color) for color in CLASS_COLORS} == {255}


def test_motion_has_constant_speed_and_stays_inside():
    for number in range(50):
        clip = draw_clip(1, number)
        assert clip.positions.min() >= RADIUS_PX
        assert clip.positions.max() <= SIZE_PX - RADIUS_PX
        steps = np.hypot(*np.diff(clip.positions, axis=0).T)
        assert steps.max() <= SPEED_PX + 1e-9
        assert np.median(steps) == pytest.approx(SPEED_PX)  # a step is shorter only if it hits a wall
        assert clip.video.shape == (len(clip.positions), SIZE_PX, SIZE_PX, 3)


def test_lengths_and_classes_follow_their_laws():
    clips = [draw_clip(0, number) for number in range(2000)]
    assert sum(LENGTH_LAW.values()) == pytest.approx(1)
    distance = total_variation(length_histogram(len(c.video) for c in clips), LENGTH_LAW)
    assert distance < 3 * sampling_total_variation(LENGTH_LAW, 2000)
    assert (np.abs(np.bincount([c.class_label for c in clips], minlength=4) / 2000 - 0.25) < 0.04).all()


def test_draws_are_reproducible_and_distinct():
    assert (draw_clip(4, 9).video == draw_clip(4, 9).video).all()
    assert not np.array_equal(draw_clip(4, 9).positions, draw_clip(5, 9).positions)
    assert not np.array_equal(draw_clip(4, 9).positions, draw_clip(4, 10).positions)


def test_the_caption_names_color_and_initial_direction():
    seen = set()
    for number in range(200):
        clip = draw_clip(2, number)
        _, color, _, _, across, _, along = clip.caption.split()
        assert color == CLASS_NAMES[clip.class_label]
        first = clip.positions[1] - clip.positions[0]
        inside = (clip.positions[0] > RADIUS_PX + SPEED_PX) & (clip.positions[0] < SIZE_PX - RADIUS_PX - SPEED_PX)
        if inside[0]:
            assert (across == "left") == (first[0] < 0)
        if inside[1]:
            assert (along == "up") == (first[1] < 0)
        seen.add((color, across, along))
    assert len(seen) == 16
