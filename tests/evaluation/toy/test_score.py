import math

import numpy as np
import pytest

from flowception.evaluation.toy.score import (
    class_of_first_frame,
    classify_color,
    fit_reflected_line,
    label_components,
    score_clip,
    score_frame,
)
from flowception.evaluation.toy.summary import SetSummary, promises, summarize
from flowception.evaluation.toy.world import BACKGROUND, CLASS_COLORS, SIZE_PX, draw_clip, fold, render_disc

EMPTY = np.broadcast_to(np.array(BACKGROUND, np.uint8), (SIZE_PX, SIZE_PX, 3))
CENTER = np.array([8.0, 8.0])


def two_discs():
    return np.maximum(
        render_disc(np.array([4.0, 4.0]), CLASS_COLORS[0]), render_disc(np.array([12.0, 12.0]), CLASS_COLORS[0])
    )


def test_components_by_hand():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 1]], bool)
    labels, count = label_components(mask)
    assert count == 3
    assert labels.tolist() == [[1, 1, 0, 0], [0, 1, 0, 2], [3, 0, 2, 2]]


def test_real_clips_satisfy_every_law():
    summary = summarize([score_clip(clip.video, clip.class_label) for clip in (draw_clip(2, k) for k in range(100))])
    assert (summary.color_right, summary.single_shape, summary.color_constant, summary.position_right) == (1, 1, 1, 1)
    assert summary.position_error_px < 0.03


@pytest.mark.parametrize("kind", ["uniform", "clipped_normal", "black", "white"])
def test_noise_satisfies_no_law(kind):
    generator = np.random.default_rng(0)
    scores = []
    for number in range(40):
        shape = (8, SIZE_PX, SIZE_PX, 3)
        video = {
            "uniform": lambda s: generator.integers(0, 256, s),
            "clipped_normal": lambda s: np.clip((generator.standard_normal(s) + 1) * 127.5, 0, 255),
            "black": np.zeros,
            "white": lambda s: np.full(s, 255),
        }[kind](shape)
        scores.append(score_clip(np.asarray(video).astype(np.uint8), number % 4))
    summary = summarize(scores)
    assert max(summary.color_right, summary.single_shape, summary.position_right, summary.color_constant) < 0.05


def test_each_wrong_shape_is_detected():
    square = np.array(EMPTY)
    square[4:11, 4:11] = CLASS_COLORS[0]
    bar = np.array(EMPTY)
    bar[6:8, 1:15] = CLASS_COLORS[0]
    speck = render_disc(CENTER, CLASS_COLORS[0])
    speck[0, 0] = 255
    hollow = render_disc(CENTER, CLASS_COLORS[0])
    hollow[5:11, 5:11] = BACKGROUND
    right = {
        "disc": render_disc(CENTER, CLASS_COLORS[0]),
        "speck": speck,
        "square": square,
    }
    wrong = {"none": EMPTY, "two": two_discs(), "bar": bar, "hollow": hollow, "full": np.full_like(EMPTY, 255)}
    assert {name: score_frame(image).single_shape for name, image in right.items()} == dict.fromkeys(right, True)
    assert {name: score_frame(image).single_shape for name, image in wrong.items()} == dict.fromkeys(wrong, False)


def test_colors():
    assert [classify_color(np.array(c, float)) for c in CLASS_COLORS] == [0, 1, 2, 3]
    assert classify_color(np.array([200.0, 200, 200])) is None
    assert classify_color(np.array([255.0, 60, 40])) == 0
    clip = draw_clip(2, 0)
    assert not score_clip(clip.video, (clip.class_label + 1) % 4).color_right
    assert score_clip(clip.video, None).color_right
    assert class_of_first_frame(clip.video) == clip.class_label


def test_a_change_of_color_is_detected():
    frames = [render_disc(CENTER, CLASS_COLORS[k // 4]) for k in range(8)]
    score = score_clip(np.stack(frames), 0)
    assert not score.color_right
    assert score.color_constant == 0.5


def test_context_frames_are_not_scored():
    video = np.stack([render_disc(CENTER, CLASS_COLORS[0]), *[EMPTY] * 2])
    assert score_clip(video, 0).single_shape == pytest.approx(1 / 3)
    score = score_clip(video, 0, given_frames=1)
    assert (score.single_shape, score.color_right, score.color_constant) == (0, False, 0)
    assert score_clip(video[:1], 0, given_frames=1).single_shape == 0


def test_fit_finds_the_line_through_a_bounce_and_a_gap():
    numbers = np.array([0, 1, 2, 5, 6, 8])
    track = fold(10.2 + 1.13 * numbers, 3.0, 13.0)
    error, speed = fit_reflected_line(numbers, track, 3.0, 13.0)
    assert math.sqrt(error) < 0.02
    assert speed == pytest.approx(1.13, abs=0.01)


@pytest.mark.parametrize("law", ["random_places", "standing_still", "through_the_wall"])
def test_other_motions_break_the_position_law(law):
    generator = np.random.default_rng(0)
    broken = 0
    for _ in range(20):
        track = {
            "random_places": generator.uniform(3, 13, (9, 2)),
            "standing_still": np.broadcast_to(generator.uniform(3, 13, 2), (9, 2)),
            "through_the_wall": 3 + (generator.uniform(0, 10, 2) + 1.5 * np.arange(9)[:, None] * [[0.8, 0.6]]) % 10,
        }[law]
        broken += not score_clip(np.stack([render_disc(p, CLASS_COLORS[1]) for p in track]), 1).position_right
    assert broken >= 18


def summary_with(color: float, shape: float) -> SetSummary:
    return SetSummary(1, 8, color, shape, 1, 1, 0, 0, 1.5, 8, 0, 0)


@pytest.mark.parametrize(
    ("generated", "untrained", "expected"),
    [
        ((0.95, 0.8), (0.2, 0.1), [True, True, True, True]),
        ((0.89, 0.8), (0.2, 0.1), [False, True, True, True]),
        ((0.95, 0.69), (0.2, 0.1), [True, True, False, True]),
        ((0.95, 0.8), (0.5, 0.5), [True, True, True, False]),  # 0.05 <= 0.5 / 8, but 0.2 > 0.5 / 8
        ((0.90, 0.8), (0.5, 0.1), [True, False, True, True]),
    ],
)
def test_promises(generated, untrained, expected):
    assert [holds for _, holds in promises(summary_with(*generated), summary_with(*untrained))] == expected
