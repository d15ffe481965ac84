"""The growth plot shows frames, noise levels and insertions."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from flowception.flow import Role
from flowception.generation.growth import (
    CONTEXT_COLOR,
    INSERTION_COLOR,
    START_COLOR,
    Growth,
    noise_levels,
)


def test_noise_levels_by_hand():
    levels = noise_levels([0.0, 0.0, 0.5], [True, False, False], num_inference_steps=4)
    nothing = np.nan
    expected = [
        [0, 0, 0, 0, 0, 0, 0],
        [1, 0.75, 0.5, 0.25, 0, 0, 0],
        [nothing, nothing, 1, 0.75, 0.5, 0.25, 0],
    ]
    np.testing.assert_allclose(levels, expected)


def test_noise_levels_with_a_time_shift():
    levels = noise_levels([0.0], [False], num_inference_steps=2, time_shift=3.0)
    np.testing.assert_allclose(levels, [[1, 1 - 0.5 / (0.5 + 3 * 0.5), 0]])


def count(picture, color):
    return int((np.abs(picture.astype(float) - 255 * np.array(to_rgb(color))).max(axis=-1) < 12).sum())


@pytest.fixture
def picture(tmp_path):
    def draw(born_at, roles):
        Growth(born_at=born_at, roles=roles, num_inference_steps=20, title="t2v, red, seed 7").save(
            tmp_path / "growth.png"
        )
        return np.asarray(Image.open(tmp_path / "growth.png").convert("RGB"))

    return draw


def test_every_frame_has_one_mark_of_its_kind(picture):
    start, free, active = Role.START, Role.FREE, Role.CONTEXT_ACTIVE
    few = picture([0, 0, 0.5, 0], [active, start, free, start])
    assert min(count(few, color) for color in (CONTEXT_COLOR, START_COLOR, INSERTION_COLOR)) > 25
    none = picture([0, 0, 0, 0], [active, start, start, start])
    assert count(none, INSERTION_COLOR) == 0
    assert count(none, START_COLOR) > 1.15 * count(few, START_COLOR)
    only = picture([0, 0.2, 0.6, 0.9], [start, free, free, free])
    assert count(only, CONTEXT_COLOR) == 0
    assert count(only, INSERTION_COLOR) > 1.8 * count(few, INSERTION_COLOR)


def test_an_insertion_is_marked_at_its_clock(picture):
    columns = []
    for born_at in (0.1, 0.9):
        shown = picture([0, born_at, 1.0], [Role.START, Role.FREE, Role.FREE])
        orange = np.abs(shown.astype(float) - 255 * np.array(to_rgb(INSERTION_COLOR))).max(axis=-1) < 12
        band = orange[: int(0.55 * len(orange))]  # above the mark of the last frame and the legend
        columns.append(np.flatnonzero(band.any(axis=0)).mean() / shown.shape[1])
    assert columns[1] - columns[0] > 0.2


def test_a_long_clip_is_drawn_in_full(picture):
    shown = picture([0.0, *np.linspace(0, 1, 63)], [Role.START] + [Role.FREE] * 63)
    assert shown.shape[0] > 1000


def test_a_title_is_not_parsed_as_math(tmp_path):
    growth = Growth(born_at=[0.0], roles=[Role.START], num_inference_steps=2, title="class a$\\foo$")
    growth.save(tmp_path / "growth.png")
    assert (tmp_path / "growth.png").is_file()
