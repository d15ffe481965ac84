"""The order of an epoch and the stratified global times of its places.

Both use keyed random numbers, so any part can be computed on its own, without advancing a generator.

Shape legend: ``K`` clips of the epoch; a *place* is a position 0..K-1 in the epoch's order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowception import rng
from flowception.data.step_plan import PlanConfig
from flowception.rng import Stream
from flowception.shards.index import ClipIndex

_ODD = np.uint64(0x9E3779B97F4A7C15)


def epoch_order(
    clip_ids: NDArray[np.uint64],
    shards: NDArray[np.uint32],
    num_shards: int,
    *,
    seed: int,
    epoch: int,
    shuffle_block_shards: int,
) -> NDArray[np.int64]:
    """Permute with locality: shards are permuted, clips are shuffled inside blocks of shards.

    Removing clips, even all clips of a shard, does not change the order of the others: all shards of the set are
    permuted, whether or not the epoch has clips of them.

    Args:
        clip_ids: [K] ids of the epoch's clips.
        shards: [K] shard of each clip.
        num_shards: Number of shards in the set; the epoch may have clips of only some.
        seed: The run's seed.
        epoch: Epoch number.
        shuffle_block_shards: Shards per block, which is how many are read at a time.

    Returns:
        [K] the clip at place 0, 1, ...
    """
    shard_place = np.empty(num_shards, dtype=np.int64)
    shard_place[rng.permutation(seed, Stream.ORDER, num_shards, epoch=epoch)] = np.arange(num_shards)
    block = shard_place[shards] // shuffle_block_shards
    within = rng.uniforms(seed, Stream.ORDER, epoch=epoch, clip=clip_ids)[..., 0]
    return np.lexsort((clip_ids, within, block)).astype(np.int64)


def stratified_uniforms(
    places: NDArray[np.int64], num_places: int, *, seed: int, epoch: int, block_clips: int
) -> NDArray[np.float64]:
    """Draw uniforms for global times, one per stratum of each block of consecutive places.

    In a block of m places, place i gets ``(pi(i) + U) / m`` with a random permutation pi. This is exactly uniform on
    [0, 1) for every place, and a complete block covers [0, 1) evenly. The last block may be smaller than the others.

    Args:
        places: [k] places to draw for.
        num_places: K.
        seed: The run's seed.
        epoch: Epoch number.
        block_clips: Places per block.

    Returns:
        [k] in [0, 1).
    """
    blocks, which = np.unique(places // block_clips, return_inverse=True)
    members = blocks[:, None] * block_clips + np.arange(block_clips)
    drawn = rng.uniforms(seed, Stream.GLOBAL_TIME, epoch=epoch, clip=members)
    exists = members < num_places
    order = np.argsort(np.where(exists, drawn[..., 0], np.inf), axis=1, kind="stable")
    stratum = np.empty_like(order)
    np.put_along_axis(stratum, order, np.arange(block_clips)[None, :].repeat(len(blocks), axis=0), axis=1)
    inside = places % block_clips
    size = exists.sum(axis=1)[which]
    value = (stratum[which, inside] + drawn[which, inside, 1]) / size
    return np.minimum(value, np.nextafter(1.0, 0.0))


def times_shown(weights: NDArray[np.float64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of times an epoch shows each clip: its weight, rounded up with the probability of its fraction.

    Args:
        weights: [K] mean number of times.
        uniforms: [K] in [0, 1).

    Returns:
        int64 [K].
    """
    floor = np.floor(weights)
    return (floor + (uniforms < weights - floor)).astype(np.int64)


def repeat_ids(clip_ids: NDArray[np.uint64], times: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Repeat each id as often as its clip is shown. Repeats get different ids, so that they are shuffled independently.

    Args:
        clip_ids: [K] ids.
        times: [K] times that each clip is shown.

    Returns:
        [sum of times] ids; the first of each clip is its own.
    """
    first = np.cumsum(times) - times
    number = (np.arange(int(times.sum())) - np.repeat(first, times)).astype(np.uint64)
    return np.repeat(clip_ids, times) + number * _ODD


class EpochOrder:
    """The order of the clips of any epoch, and the global times of its places."""

    def __init__(self, index: ClipIndex, rows: NDArray[np.int32], sizes: PlanConfig, seed: int) -> None:
        """Store the arguments; orders are made on request.

        Args:
            index: The set's index. Its weights set how often an epoch shows each clip; without weights, once.
            rows: Rows to show.
            sizes: Sizes of the blocks of shards and of places.
            seed: The run's seed.
        """
        self._index, self._rows, self._sizes, self._seed = index, rows, sizes, seed
        self._counted: tuple[int, int] | None = None

    def _times_shown(self, epoch: int) -> NDArray[np.int64]:
        """How often an epoch shows each row: once, or as drawn from the weights of a mixture."""
        if self._index.weights is None:
            return np.ones(len(self._rows), np.int64)
        ids = self._index.clips["clip_id"][self._rows]
        uniforms = rng.uniforms(self._seed, Stream.ORDER, epoch=epoch, clip=ids)[..., 1]
        return times_shown(self._index.weights[self._rows], uniforms)

    def _num_places(self, epoch: int) -> int:
        if self._index.weights is None:
            return len(self._rows)
        counted = self._counted  # another thread may replace it with another epoch's
        if counted is None or counted[0] != epoch:
            self._counted = counted = (epoch, int(self._times_shown(epoch).sum()))
        return counted[1]

    def rows_by_place(self, epoch: int) -> NDArray[np.int32]:
        """[K] rows of the epoch's clips, in order."""
        clips, times = self._index.clips, self._times_shown(epoch)
        rows, shards = np.repeat(self._rows, times), clips["shard"]
        by_place = epoch_order(
            repeat_ids(clips["clip_id"][self._rows], times),
            shards[rows],
            int(shards.max()) + 1,
            seed=self._seed,
            epoch=epoch,
            shuffle_block_shards=self._sizes.shuffle_block_shards,
        )
        return rows[by_place]

    def u_time(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """[k] uniforms for the global times of the given [k] places, stratified over blocks of places."""
        block_clips, num_places = self._sizes.time_block_clips, self._num_places(epoch)
        return stratified_uniforms(places, num_places, seed=self._seed, epoch=epoch, block_clips=block_clips)
