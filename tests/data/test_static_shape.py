"""Sizes that no pack can exceed."""

import numpy as np
import pytest

from flowception.data.static_shape import fewest_visible_frames, static_shape
from flowception.flow.delays import DELAY_LAWS
from flowception.flow.extended_time import ProcessConfig, draw_clips
from flowception.flow.task import TASKS
from flowception.nn.layout import ClipShape, build_layout

LENGTHS = np.arange(1, 8)


@pytest.mark.parametrize("delay_law", DELAY_LAWS)
@pytest.mark.parametrize("starts", [0, 1, 3])
@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_no_draw_shows_fewer_frames(delay_law, starts, task):
    """At clock 0, where fewest are visible; with tasks and laws whose number of frames then is fixed it is that."""
    config = ProcessConfig(tasks={task: 1.0}, delay_law=delay_law, num_start_frames=starts)
    frames, random = np.repeat(LENGTHS, 400), np.random.default_rng(0)
    draws = draw_clips(
        config, frames, np.zeros(len(frames)), random.random(len(frames)), random.random((len(frames), 7, 2))
    )
    shown = draws.visible_frames.numpy().reshape(len(LENGTHS), -1).min(axis=1)
    fewest = fewest_visible_frames(config, LENGTHS)
    assert (shown >= fewest).all()
    assert (fewest >= 1).all()
    if delay_law != "full_sequence" and (task in ("t2v", "i2v") or (task == "v2v" and delay_law != "autoregressive")):
        assert shown.tolist() == fewest.tolist()


def test_the_least_of_a_mixture_counts():
    mixture = ProcessConfig(tasks={"t2v": 0.8, "i2v": 0.2, "completion": 0.0}, num_start_frames=3)
    assert fewest_visible_frames(mixture, np.array([1, 2, 3, 4, 19])).tolist() == [1, 2, 3, 3, 3]
    mixture = ProcessConfig(tasks={"i2v": 0.5, "completion": 0.5}, num_start_frames=3)
    assert fewest_visible_frames(mixture, np.array([1, 2, 4])).tolist() == [1, 1, 1]


def test_a_pack_of_the_clips_with_most_text_fits():
    """The worst pack there can be: clips that show 3 of their frames, 7 tokens each, and 10 tokens of text."""
    process = ProcessConfig(tasks={"t2v": 1.0}, num_start_frames=3)
    numbers = (np.array(column) for column in ([8, 5, 8], [7, 7, 9], [10, 4, 10]))
    shape = static_shape(process, 3 * 31, *numbers)
    assert (shape.max_frames, shape.max_clips, shape.max_seqlen, shape.max_text_tokens) == (13, 13, 82, 30)
    build_layout([ClipShape(3, 2, 3, 10)] * 3, shape)
    with pytest.raises(ValueError, match="max_text_tokens = 40"):
        build_layout([ClipShape(1, 2, 3, 10)] * 4, shape)
