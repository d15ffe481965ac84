import numpy as np
import pytest

from flowception.data.packing import CARRIED, imbalance, pack_clips


def test_longest_first_by_hand():
    # FLOPs 9, 8, 5, 4, 2 over two packs: 9 | 8, then 5 to 8, 4 to 9, 2 to the one of 13 with the smaller number.
    tokens = np.array([2, 4, 8, 5, 9])
    packs = pack_clips(tokens, tokens.astype(float), 2, 100)
    assert packs.tolist() == [0, 0, 1, 1, 0]


def test_capacity_counts_tokens_and_what_has_no_room_is_carried():
    # 6 | 5, then 4 fits beside neither, 3 beside the 5.
    tokens = np.array([6, 5, 4, 3])
    assert pack_clips(tokens, tokens.astype(float), 2, 8).tolist() == [1, 0, CARRIED, 0]


def test_an_urgent_clip_goes_before_longer_ones():
    tokens = np.array([4, 6, 5, 3])
    packs = pack_clips(tokens, tokens.astype(float), 2, 8, num_urgent=1)
    assert packs[0] != CARRIED


def test_flops_and_not_tokens_are_balanced():
    tokens, flops = np.array([10, 5, 5, 5]), np.array([30.0, 10.0, 10.0, 10.0])
    packs = pack_clips(tokens, flops, 2, 100)
    assert packs.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_random_clips_stay_within_capacity_and_packs_are_sorted(seed):
    random = np.random.default_rng(seed)
    tokens = random.integers(3, 20, 200)
    flops = tokens.astype(float) + tokens**2 / 50
    packs = pack_clips(tokens, flops, 16, 140)
    placed = packs >= 0
    assert np.bincount(packs[placed], tokens[placed], 16).max() <= 140
    loads = np.bincount(packs[placed], flops[placed], 16)
    assert np.all(np.diff(loads) <= 0)
    room = 140 - np.bincount(packs[placed], tokens[placed], 16)
    assert not len(tokens[~placed]) or tokens[~placed].min() > room.max()


def test_no_clips():
    assert len(pack_clips(np.zeros(0, np.int64), np.zeros(0), 3, 10)) == 0
    assert imbalance(np.zeros(3)) == 0.0
    assert imbalance(np.array([1.0, 2.0, 3.0])) == 0.5
