"""The static sizes of a run's packs, from the index and the process: what no pack can exceed.

Shape legend: ``M`` clips.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowception.flow.extended_time import ProcessConfig
from flowception.flow.task import TASKS
from flowception.nn.layout import PackShape


def fewest_visible_frames(process: ProcessConfig, num_frames: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frames that a clip shows at any time, in any epoch: context and start frames, which are there from the beginning.

    Args:
        process: The process, with any tasks and any law of delays.
        num_frames: [M] latent frames of the clips, at least 1.

    Returns:
        int64 [M], least over the tasks in the mixture; at most ``num_frames``.
    """
    starts = 1 if process.delay_law == "autoregressive" else process.num_start_frames
    least = {"t2v": max(1, starts), "i2v": 1 + starts, "v2v": 1 + starts, "interpolation": 2, "completion": 1}
    alone, fewest = np.minimum(num_frames, least["t2v"]), num_frames
    for task, share in zip(TASKS, process.task_probabilities(), strict=True):
        if share > 0:  # a clip too short for a task plays text-to-video
            shown = np.minimum(num_frames, least[task.name])
            fewest = np.minimum(fewest, np.where(num_frames < task.min_frames, alone, shown))
    return fewest


def static_shape(
    process: ProcessConfig,
    token_budget: int,
    num_frames: NDArray[np.int64],
    tokens_per_frame: NDArray[np.int64],
    text_tokens: NDArray[np.int64],
) -> PackShape:
    """Sizes that hold every pack of a run.

    A pack of T tokens has room for frames of the smallest grid alone. Of a clip's tokens text is the largest share
    where it shows the fewest frames, so no more of a pack is text than of the clip where this share is largest.

    Args:
        process: The process.
        token_budget: T.
        num_frames: [M] latent frames of every clip of the set.
        tokens_per_frame: [M].
        text_tokens: [M], the most text that each can bring.

    Returns:
        The shape.
    """
    fewest = fewest_visible_frames(process, num_frames) * tokens_per_frame
    most_frames = token_budget // int(tokens_per_frame.min())
    return PackShape(
        token_budget=token_budget,
        max_frames=most_frames,
        max_clips=most_frames,
        max_seqlen=int((text_tokens + num_frames * tokens_per_frame).max()),
        max_text_tokens=int(np.ceil(token_budget * float((text_tokens / (text_tokens + fewest)).max()))),
    )
