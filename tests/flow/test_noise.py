"""The sampler's noise: its distribution, and that a frame's noise depends only on its key."""

import numpy as np
import pytest

from flowception.flow.noise import MAX_ELEMENTS, fresh_noise

SHAPE = (3, 5, 1)


def test_it_is_standard_normal_and_uncorrelated():
    clips = np.repeat(np.arange(2000), 10)
    x = fresh_noise(clips, 4, np.tile(np.arange(10), 2000), SHAPE).reshape(2000, 10, 15)
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1
    for a, b in ((x[:, :, 0], x[:, :, 1]), (x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
        assert abs((a * b).mean()) < 0.03


def test_a_frame_is_the_same_alone_or_among_others(monkeypatch):
    clips, slots = np.array([7, 7, 9, 2**40, 1]), np.array([0, 1, 0, 4000, 63])
    together = fresh_noise(clips, 3, slots, SHAPE)
    for i in range(5):
        assert np.array_equal(fresh_noise(clips[i : i + 1], 3, slots[i : i + 1], SHAPE)[0], together[i])
    monkeypatch.setattr("flowception.flow.noise._CHUNK_ELEMENTS", 30)
    assert np.array_equal(fresh_noise(clips, 3, slots, SHAPE), together)


@pytest.mark.parametrize("other", [(8, 3, 0), (7, 4, 0), (7, 3, 1)])
def test_clip_step_and_slot_all_matter(other):
    one = fresh_noise(np.array([7]), 3, np.array([0]), SHAPE)
    clip, step, slot = other
    assert not np.isin(fresh_noise(np.array([clip]), step, np.array([slot]), SHAPE), one).any()


def test_a_frame_too_large_for_the_counter_is_rejected():
    with pytest.raises(ValueError, match="elements"):
        fresh_noise(np.array([0]), 0, np.array([0]), (MAX_ELEMENTS, 2, 1))
