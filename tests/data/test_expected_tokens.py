import numpy as np
import pytest

from flowception.data.expected_tokens import TOKEN_UNITS, token_moments, visible_moments
from flowception.flow.delays import DELAY_LAWS
from flowception.flow.extended_time import ProcessConfig, draw_clips
from flowception.shards.index import ClipIndex


@pytest.mark.parametrize("delay_law", DELAY_LAWS)
def test_moments_match_a_simulation(delay_law):
    config = ProcessConfig(tasks={"t2v": 1.0, "i2v": 1.0}, delay_law=delay_law, insertion_share=0.7)
    lengths, random = np.array([1, 2, 6, 19]), np.random.default_rng(3)
    mean, variance = visible_moments(config, lengths)
    for place, length in enumerate(lengths.tolist()):
        frames = np.full(40_000, length)
        draws = draw_clips(config, frames, *random.random((2, 40_000)), random.random((40_000, length, 2)))
        visible = draws.visible_frames.numpy()
        assert mean[place] == pytest.approx(visible.mean(), rel=0.01)
        assert variance[place] == pytest.approx(visible.var(), rel=0.15, abs=0.01)


def test_text_tokens_are_weighted_by_how_often_the_text_is_shown():
    # Full-sequence: every frame is visible, so only the text varies: 10 tokens in 3 of 4 epochs, else 2.
    config = ProcessConfig(delay_law="full_sequence", condition_dropout=0.25)
    index = ClipIndex.from_arrays(frames=[3, 3], height=2, width=3, text_tokens=[10, 0])
    mean, variance = token_moments(config, index, 2)
    assert mean.tolist() == [TOKEN_UNITS * (21 + 8), TOKEN_UNITS * (21 + 2)]
    assert variance.tolist() == pytest.approx([0.25 * 0.75 * 64, 0.0])


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("starts", [1, 3])
def test_the_mean_is_accurate_to_a_fraction_of_a_percent_at_every_length(share, starts):
    """Text-to-video, linear: frame 0 and start frames are visible, others with the clipped clock's probability."""
    config = ProcessConfig(tasks={"t2v": 1.0}, num_start_frames=starts, insertion_share=share)
    lengths = np.arange(1, 65)
    mean, _ = visible_moments(config, lengths)
    free = np.maximum(0, lengths - starts)
    exact = lengths - free + free * (share * 0.5 + (1 - share))
    assert np.abs(mean / exact - 1).max() < 4e-3  # below the margin in epoch.py
