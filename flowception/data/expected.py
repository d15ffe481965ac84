"""How many tokens clips are expected to have in a pack: what the index and the process say before anything is drawn.

A large epoch is cut into segments by it (``epoch.py``). Numbers are whole, so that every rank cuts alike.

Shape legend: ``M`` clips, ``K`` different lengths, ``S`` samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowception import rng
from flowception.flow.extended_time import ProcessConfig, draw_clips
from flowception.rng import Stream

_SAMPLES = 1024


def visible_moments(
    process: ProcessConfig, lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of the number of visible frames of clips of some lengths, from samples that never change.

    Args:
        process: The process, with any tasks and any law of delays.
        lengths: [K] latent frames, at least 1.

    Returns:
        [K] and [K].
    """
    mean, variance = np.empty(len(lengths)), np.empty(len(lengths))
    sample = np.arange(_SAMPLES)
    for place, length in enumerate(lengths.tolist()):
        u_frame = rng.uniforms(0, Stream.FRAME, clip=sample[:, None], frame=np.arange(length))
        u_task = rng.uniforms(0, Stream.TASK, clip=sample)[:, 0]
        frames = np.full(_SAMPLES, length)
        visible = draw_clips(process, frames, (sample + 0.5) / _SAMPLES, u_task, u_frame).visible_frames.numpy()
        mean[place], variance[place] = visible.mean(), visible.var()
    return mean, variance


def token_moments(
    process: ProcessConfig,
    frames: NDArray[np.int64],
    tokens_per_frame: NDArray[np.int32],
    own_text: NDArray[np.int64],
    null_text: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Mean, to the next whole number, and variance of the visible tokens of clips.

    Args:
        process: The process.
        frames: [M] latent frames.
        tokens_per_frame: [M].
        own_text: [M] tokens of each clip's text, 0 for none.
        null_text: Tokens of the text that stands in for none.

    Returns:
        [M], at least 1, and [M].
    """
    lengths, which = np.unique(frames, return_inverse=True)
    mean, variance = visible_moments(process, lengths)
    dropped = np.where(own_text > 0, process.condition_dropout, 1.0)
    tokens = mean[which] * tokens_per_frame + (1.0 - dropped) * own_text + dropped * null_text
    spread = variance[which] * tokens_per_frame.astype(np.float64) ** 2
    spread += dropped * (1.0 - dropped) * (own_text - null_text).astype(np.float64) ** 2
    return np.maximum(1, np.rint(tokens)).astype(np.int64), spread
