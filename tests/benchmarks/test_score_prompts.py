"""Prompt scores of toy clips with known color and direction."""

import numpy as np

from benchmarks.score_prompts import direction_right, score
from flowception.evaluation.toy.world import CLASS_COLORS, draw_clip, render_disc

SIZE_PX = 32


def moving_disc(start, step, label=0, frames=4):
    positions = np.array(start) + np.arange(frames)[:, None] * np.array(step)
    return np.stack([render_disc(position, CLASS_COLORS[label], SIZE_PX) for position in positions])


def test_a_direction_is_correct_along_both_axes():
    up_left = moving_disc((20.0, 20.0), (-2.0, -2.0))
    assert direction_right(up_left, left=True, up=True)
    assert not direction_right(up_left, left=False, up=True)
    assert not direction_right(up_left, left=True, up=False)
    assert direction_right(up_left[::-1], left=False, up=False)


def test_without_a_step_there_is_no_direction():
    clip = moving_disc((20.0, 20.0), (-2.0, -2.0))
    empty = np.zeros_like(clip)
    for video in (clip[:1], clip[[0, 0]], empty):
        assert not any(direction_right(video, left, up) for left in (True, False) for up in (True, False))


def test_real_clips_score_well_and_wrong_prompts_do_not():
    clips = [draw_clip(5, number) for number in range(24)]
    asked = [(clip.video, clip.class_label, bool(clip.velocity[0] < 0), bool(clip.velocity[1] < 0)) for clip in clips]
    right = score(asked)
    assert (right.clips, right.color_right, right.single_shape) == (24, 1.0, 1.0)
    assert right.direction_right > 0.6  # a clip that hits a wall in its first step turns before it is seen to move
    assert right.mean_frames == np.mean([len(clip.video) for clip in clips])
    wrong = score([(video, (label + 1) % len(CLASS_COLORS), not left, not up) for video, label, left, up in asked])
    assert wrong.color_right == 0.0
    assert wrong.direction_right < 0.2
