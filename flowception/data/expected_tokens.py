"""Expected tokens of clips in a pack, from the index and the process, before anything is drawn.

A large epoch is cut into segments by these numbers (``epoch.py``). They are integers, so that every rank makes the same
cuts.

A mean must be accurate to a fraction of a percent: its error is the same for every clip of a length, and a set may have
clips of one length only. So the samples are not independent. They form a Kronecker sequence, the multiples of square
roots of primes modulo 1, whose error falls as ``1 / S`` instead of ``1 / sqrt(S)``.

Shape legend: ``M`` clips, ``K`` different lengths, ``S`` samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowception.flow.extended_time import ProcessConfig, draw_clips
from flowception.shards.index import ClipIndex

TOKEN_UNITS = 64
"""Mean tokens are integers in units of ``1 / TOKEN_UNITS`` token."""
_SAMPLES = 2048


def visible_moments(
    process: ProcessConfig, lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimate mean and variance of the number of visible frames by clip length, from fixed samples.

    Args:
        process: The process, with any tasks and any delay law.
        lengths: [K] latent frames, at least 1.

    Returns:
        Mean [K] and variance [K].
    """
    mean, variance = np.empty(len(lengths)), np.empty(len(lengths))
    u_time = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    u_all = _kronecker(1 + 2 * int(lengths.max(initial=0)))
    for place, length in enumerate(lengths.tolist()):
        u_frame = u_all[:, 1 : 1 + 2 * length].reshape(_SAMPLES, length, 2)
        visible = draw_clips(process, np.full(_SAMPLES, length), u_time, u_all[:, 0], u_frame).visible_frames.numpy()
        mean[place], variance[place] = visible.mean(), visible.var()
    return mean, variance


def _kronecker(dimensions: int) -> NDArray[np.float64]:
    """[S, dimensions] in [0, 1): multiples of the square roots of the first primes, modulo 1."""
    primes, candidate = list[int](), 2
    while len(primes) < dimensions:
        if all(candidate % prime for prime in primes):
            primes.append(candidate)
        candidate += 1
    roots = np.sqrt(np.array(primes, dtype=np.float64))
    return np.arange(1.0, _SAMPLES + 1)[:, None] * roots % 1.0


def token_moments(
    process: ProcessConfig, index: ClipIndex, null_text_tokens: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Estimate mean and variance of the visible tokens of every clip of a set.

    Args:
        process: The process.
        index: The set's index.
        null_text_tokens: Length of the null text; None for a network without text.

    Returns:
        Mean [M] in units of ``1 / TOKEN_UNITS`` token, at least one token, and variance [M] in tokens squared.
    """
    lengths, which = np.unique(index.clips["frames"].astype(np.int64), return_inverse=True)
    mean, variance = visible_moments(process, lengths)
    tokens = mean[which] * index.tokens_per_frame
    spread = variance[which] * index.tokens_per_frame.astype(np.float64) ** 2
    if null_text_tokens is not None:
        own = index.clips["text_tokens"].astype(np.int64)
        dropped = np.where(own > 0, process.condition_dropout, 1.0)
        tokens = tokens + (1.0 - dropped) * own + dropped * null_text_tokens
        spread += dropped * (1.0 - dropped) * (own - null_text_tokens).astype(np.float64) ** 2
    return np.maximum(TOKEN_UNITS, np.rint(TOKEN_UNITS * tokens)).astype(np.int64), spread
