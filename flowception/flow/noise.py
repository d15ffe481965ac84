"""Initial noise of the sampler's frames, keyed by clip seed, birth step and slot.

A clip is therefore the same when sampled alone or in a batch. One call of the counter-based generator
(``flowception.rng.uniforms``) draws all frames born in a step. The Box-Muller transform turns them into normals, which
is cheap for many small frames as well as for a few large ones.

Shape legend: ``K`` frames, ``E`` elements of a frame.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from flowception.rng import Stream, uniforms

_BLOCK_BITS = 20
MAX_SLOTS = 2 ** (32 - _BLOCK_BITS) - 1
"""Slots that fit into the counter's 32-bit frame word next to the block number. Also the sampler's frame limit."""
MAX_ELEMENTS = 2 ** (_BLOCK_BITS + 1)
_CHUNK_ELEMENTS = 2**19


def _normals(clip_seeds: NDArray[np.int64], step: int, slots: NDArray[np.int64], elements: int) -> NDArray[np.float32]:
    blocks = -(-elements // 2)
    # The insertion rules' uniforms use slot 0 of the word, so noise starts at slot 1.
    words = ((slots[:, None] + 1) << _BLOCK_BITS) | np.arange(blocks)
    u = uniforms(0, Stream.SAMPLER, epoch=step, clip=clip_seeds[:, None], frame=words)
    radius = np.sqrt(-2 * np.log1p(-u[..., 0]))
    angle = 2 * math.pi * u[..., 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).astype(np.float32)
    return pairs.reshape(len(slots), 2 * blocks)[:, :elements]


def fresh_noise(
    clip_seeds: NDArray[np.int64], step: int, slots: NDArray[np.int64], frame_shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Standard normal frames.

    Args:
        clip_seeds: [K], seed of each frame's clip, at least 0.
        step: Sampler step at the end of which the frames are born; 0 for start frames.
        slots: [K], each frame's rank in its clip at birth, below ``MAX_SLOTS``.
        frame_shape: Shape of a frame, (C, H, W).

    Returns:
        float32 [K, C, H, W].

    Raises:
        ValueError: If a frame is empty or has more than ``MAX_ELEMENTS`` elements.
    """
    elements = math.prod(frame_shape)
    if not 0 < elements <= MAX_ELEMENTS:
        raise ValueError(f"a frame must have 1 to {MAX_ELEMENTS} elements, got {elements} (frame_shape {frame_shape})")
    noise = np.empty((len(slots), elements), dtype=np.float32)
    at_once = max(1, _CHUNK_ELEMENTS // elements)
    for first in range(0, len(slots), at_once):
        here = slice(first, first + at_once)
        noise[here] = _normals(clip_seeds[here], step, slots[here], elements)
    return noise.reshape(len(slots), *frame_shape)
