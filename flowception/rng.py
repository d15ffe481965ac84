"""Counter-based random numbers: a draw depends only on its key, never on earlier draws.

Every draw is a pure function of ``(seed, stream, epoch, clip, frame)``. It is therefore the same on any rank, in any
worker and after any resume, and there is no generator state to save.

* ``uniforms`` is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorized
  over numpy arrays so that one call draws a complete epoch.
* ``normals`` is numpy's Philox-4x64-10 with the same key, for the noise of latents.
* ``permutation`` shuffles with numpy's generator and the same key.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW_32, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10
_BLOCK = 16384
MAX_SEED = 2**56 - 1


class Stream(IntEnum):
    """Purpose of a draw. Streams are independent. Never renumber a stream."""

    ORDER = 1
    GLOBAL_TIME = 2
    FRAME = 3
    TASK = 4
    NOISE = 5
    CONDITION_DROPOUT = 6
    SAMPLER = 7
    VALIDATION = 8
    TOY_WORLD = 9


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be an integer from 0 to {MAX_SEED}, got {seed}")


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox-4x32-10: four random words for each counter.

    Args:
        counter: Shape ``[..., 4]``.
        key: Two 32-bit words.

    Returns:
        Random words, shape ``[..., 4]``.
    """
    words = np.ascontiguousarray(np.asarray(counter, dtype=np.uint32).reshape(-1, 4).T, dtype=np.uint64)
    for start in range(0, words.shape[1], _BLOCK):
        _philox_rounds(words[:, start : start + _BLOCK], key)
    return words.T.astype(np.uint32).reshape(*np.shape(counter)[:-1], 4)


def _philox_rounds(words: NDArray[np.uint64], key: tuple[int, int]) -> None:
    """All rounds on counters ``[4, K]``, in place. K is small enough for all arrays to stay in the CPU cache."""
    c0, c1, c2, c3 = words.copy()
    high_0, high_1 = np.empty_like(c0), np.empty_like(c0)
    for turn in range(_ROUNDS):
        np.multiply(c0, _MULTIPLIER_0, out=c0)  # the products of 32-bit words, exact in 64
        np.multiply(c2, _MULTIPLIER_1, out=c2)
        np.right_shift(c0, _32, out=high_0)
        np.right_shift(c2, _32, out=high_1)
        np.bitwise_and(c0, _LOW_32, out=c0)
        np.bitwise_and(c2, _LOW_32, out=c2)
        np.bitwise_xor(high_1, c1, out=c1)
        np.bitwise_xor(c1, np.uint64((key[0] + turn * _WEYL_0) & 0xFFFFFFFF), out=c1)
        np.bitwise_xor(high_0, c3, out=c3)
        np.bitwise_xor(c3, np.uint64((key[1] + turn * _WEYL_1) & 0xFFFFFFFF), out=c3)
        c0, c1, c2, c3 = c1, c2, c3, c0
    words[:] = c0, c1, c2, c3


def uniforms(
    seed: int, stream: Stream, *, epoch: ArrayLike = 0, clip: ArrayLike = 0, frame: ArrayLike = 0
) -> NDArray[np.float64]:
    """Two independent uniforms in [0, 1) for each ``(epoch, clip, frame)``.

    Args:
        seed: The run's seed, 0 to ``MAX_SEED``.
        stream: Purpose of the draw.
        epoch: Non-negative, below 2^32. Broadcasts with the others.
        clip: A clip's 64-bit id (or any non-negative integer below 2^64).
        frame: Non-negative, below 2^32.

    Returns:
        Shape ``[..., 2]`` with 53 random bits each, where ``...`` is the broadcast shape of the three.

    Raises:
        ValueError: If the seed is out of range.
    """
    _check_seed(seed)
    e, c, f = np.broadcast_arrays(
        np.asarray(epoch, dtype=np.uint32), np.asarray(clip, dtype=np.uint64), np.asarray(frame, dtype=np.uint32)
    )
    counter = np.empty((4, *c.shape), dtype=np.uint64)
    counter[0], counter[1], counter[2], counter[3] = c & _LOW_32, c >> _32, e, f
    words, result = counter.reshape(4, -1), np.empty((*c.shape, 2))
    pairs, key = result.reshape(-1, 2), (seed & 0xFFFFFFFF, (int(stream) << 24) | (seed >> 32))
    for start in range(0, c.size, _BLOCK):
        block = words[:, start : start + _BLOCK]
        _philox_rounds(block, key)
        for column in range(2):  # 27 bits of one word and 26 of the next
            bits = (block[2 * column] >> np.uint64(5) << np.uint64(26)) | (block[2 * column + 1] >> np.uint64(6))
            np.multiply(bits, 2.0**-53, out=pairs[start : start + _BLOCK, column])
    return result


def _generator(seed: int, stream: Stream, epoch: int, clip: int, frame: int) -> np.random.Generator:
    _check_seed(seed)
    key = np.array([(seed << 8) | int(stream), clip], dtype=np.uint64)
    counter = np.array([0, 0, frame, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normals(
    seed: int, stream: Stream, shape: tuple[int, ...], *, epoch: int = 0, clip: int = 0, frame: int = 0
) -> NDArray[np.float32]:
    """Standard normals of one frame, float32 of the given shape."""
    return _generator(seed, stream, epoch, clip, frame).standard_normal(shape, dtype=np.float32)


def permutation(seed: int, stream: Stream, size: int, *, epoch: int = 0, part: int = 0) -> NDArray[np.int64]:
    """A random permutation of ``size`` items; ``part`` distinguishes several permutations in one epoch."""
    return _generator(seed, stream, epoch, part, 0).permutation(size)
