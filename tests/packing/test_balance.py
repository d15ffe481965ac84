import numpy as np
import pytest

from flowception.packing.balance import CARRIED, _longest_first, imbalance, pack_clips


def test_longest_first_and_exchanges_worked_example():
    # 9 | 8, then 5 to 8, 4 to 9, 2 to 9 or 8 (13 each): 15 and 13. Exchanging 9 and 2 for 8 and 5, one less, gives 14.
    tokens = np.array([2, 4, 8, 5, 9])
    order = np.argsort(-tokens)
    assert _longest_first(tokens, tokens.astype(float), order, 2, 100).tolist() == [0, 0, 1, 1, 0]
    packs = pack_clips(tokens, tokens.astype(float), 2, 100)
    assert np.bincount(packs, tokens).tolist() == [14, 14]


def test_exchanges_keep_the_capacity_and_only_help():
    random = np.random.default_rng(7)
    for _ in range(20):
        frames, num_packs = random.integers(3, 20, 160), 8
        tokens = 65 * frames + 77
        flops = tokens + tokens**2 / 7000
        budget = int(tokens.sum() / num_packs * 1.01)
        alone = _longest_first(tokens, flops, np.argsort(-flops, kind="stable"), num_packs, budget)
        packs = pack_clips(tokens, flops, num_packs, budget)
        before, after = (np.bincount(p[p != CARRIED], tokens[p != CARRIED]) for p in (alone, packs))
        assert after.max() <= budget
        assert after.sum() >= max(before.sum(), 0.985 * budget * num_packs)
        loads = [np.bincount(p[p != CARRIED], flops[p != CARRIED]) for p in (alone, packs)]
        assert imbalance(loads[1]) <= max(0.002, imbalance(loads[0])) + 1e-9


def test_packs_set_aside_as_too_full_are_tried_again_for_smaller_clips():
    # Naive search over all packs, clip by clip, is the oracle.
    random = np.random.default_rng(8)
    for _ in range(20):
        tokens = random.integers(1, 30, 60)
        flops, order = tokens * random.uniform(0.5, 2.0, 60), random.permutation(60)
        load, room, expected = np.zeros(7), np.full(7, 80), np.full(60, CARRIED)
        for clip in order:
            fits = np.flatnonzero(room >= tokens[clip])
            if len(fits):
                pack = fits[np.argmin(load[fits])]
                expected[clip], load[pack], room[pack] = pack, load[pack] + flops[clip], room[pack] - tokens[clip]
        assert np.array_equal(_longest_first(tokens, flops, order, 7, 80), expected)


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
