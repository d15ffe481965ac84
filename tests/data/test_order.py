import numpy as np
import pytest

from flowception.data.order import epoch_order, stratified_uniforms


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**63, count).astype(np.uint64)


def test_the_order_is_a_permutation_that_changes_with_seed_and_epoch():
    shards = (np.arange(500) // 10).astype(np.uint32)
    orders = [
        epoch_order(ids(500), shards, 50, seed=s, epoch=e, shuffle_block_shards=4) for s, e in ((1, 0), (1, 1), (2, 0))
    ]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(500))
    assert not any(np.array_equal(orders[0], other) for other in orders[1:])


def test_a_block_holds_complete_shards():
    shards = (np.arange(500) // 10).astype(np.uint32)
    order = epoch_order(ids(500), shards, 50, seed=1, epoch=0, shuffle_block_shards=5)
    blocks = [set(shards[order[i : i + 50]].tolist()) for i in range(0, 500, 50)]
    assert all(len(block) == 5 for block in blocks)
    assert set.union(*blocks) == set(range(50))
    assert any(max(block) - min(block) > 10 for block in blocks)


@pytest.mark.parametrize("skipped", [[7, 123], list(range(490, 500)), list(range(230, 240))])
def test_skipping_clips_moves_no_others_even_if_a_shard_loses_all(skipped):
    shards = (np.arange(500) // 10).astype(np.uint32)
    kept = np.delete(np.arange(500), skipped)
    whole = epoch_order(ids(500), shards, 50, seed=1, epoch=3, shuffle_block_shards=4)
    part = kept[epoch_order(ids(500)[kept], shards[kept], 50, seed=1, epoch=3, shuffle_block_shards=4)]
    assert np.array_equal(part, whole[~np.isin(whole, skipped)])


@pytest.mark.parametrize("block", [1, 4, 32])
def test_each_block_has_one_time_in_each_stratum(block):
    places = np.arange(70)
    values = stratified_uniforms(places, 70, seed=3, epoch=0, block_clips=block)
    for start in range(0, 70, block):
        part = values[start : start + block]
        assert np.array_equal(np.sort((part * len(part)).astype(int)), np.arange(len(part)))


def test_any_subset_of_places_gets_the_same_times():
    whole = stratified_uniforms(np.arange(1000), 1000, seed=3, epoch=5, block_clips=32)
    some = np.array([999, 3, 500, 4, 31, 32])
    assert np.array_equal(stratified_uniforms(some, 1000, seed=3, epoch=5, block_clips=32), whole[some])


def test_every_place_is_uniform_over_epochs_even_in_the_short_last_block():
    epochs = 4000
    values = np.array([stratified_uniforms(np.arange(19), 19, seed=3, epoch=e, block_clips=8) for e in range(epochs)])
    ordered = np.sort(values, axis=0)
    expected = (np.arange(epochs) + 0.5)[:, None] / epochs
    kolmogorov_smirnov = np.abs(ordered - expected).max(axis=0) * np.sqrt(epochs)
    assert kolmogorov_smirnov.max() < 2.0  # p = 7e-4 for one place, 19 of them


def test_block_means_have_small_variance():
    values = stratified_uniforms(np.arange(32 * 500), 32 * 500, seed=3, epoch=0, block_clips=32)
    means = values.reshape(500, 32).mean(axis=1)
    independent = (1 / 12 / 32) ** 0.5
    stratified = independent / 32  # each stratum has 1/32 of the width
    assert 0.8 < means.std() / stratified < 1.25
