"""Random draws for the clips of an epoch: times, roles, delays, and which clips are trained without their condition.

Every draw is a function of the run's seed, the epoch, and the clip's id and place only. So the plan that balances a
pack, the rank that builds it, and a test that repeats it all get the same draws.

Shape legend: ``M`` clips of the index, ``k`` of a pack, ``B`` clips, ``B, N`` as in ``flow``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowception import rng
from flowception.data.step_plan import PackPlan
from flowception.flow.extended_time import ClipDraws, ProcessConfig, draw_clips
from flowception.rng import Stream
from flowception.shards.index import ClipIndex


@dataclass(frozen=True, eq=False)
class PackDraws:
    """All draws for the clips of a pack."""

    clips: ClipDraws
    """Times, roles and delays, in the order of the pack."""
    keeps_condition: NDArray[np.bool_]
    """[k]: trained with its class and text. The other clips are trained without, for guidance."""
    shows_caption: NDArray[np.bool_]
    """[k]: trained with its own text. The other clips have the null text, exactly like an unconditional clip in
    sampling."""
    text_tokens: NDArray[np.int64]
    """[k]: number of text tokens; 0 for a network without text."""


class EpochDraws:
    """Draws of the clips of one index, for any epoch."""

    def __init__(self, index: ClipIndex, process: ProcessConfig, seed: int, null_text_tokens: int | None) -> None:
        """Store the arguments; every draw is computed on request.

        Args:
            index: The set's index.
            process: The process.
            seed: The run's seed.
            null_text_tokens: Length of the null text; None for a network without text.
        """
        self.index, self.process, self.seed, self.null_text_tokens = index, process, seed, null_text_tokens

    def of_clips(self, epoch: int, rows: NDArray[np.int64], u_time: NDArray[np.float64]) -> ClipDraws:
        """Draw times, roles, and delays of some clips, in the given order.

        Args:
            epoch: Epoch number.
            rows: [B] rows in the index.
            u_time: [B] uniforms for the global times.
        """
        ids, frames = self.index.clips["clip_id"][rows], self.index.clips["frames"][rows].astype(np.int64)
        u_task = rng.uniforms(self.seed, Stream.TASK, epoch=epoch, clip=ids)[..., 0]
        slots = np.arange(int(frames.max(initial=0)))
        u_frame = rng.uniforms(self.seed, Stream.FRAME, epoch=epoch, clip=ids[:, None], frame=slots)
        return draw_clips(self.process, frames, u_time, u_task, u_frame)

    def of_pack(self, epoch: int, rows: NDArray[np.int64], u_time: NDArray[np.float64]) -> PackDraws:
        """Draw everything for some clips; arguments as in ``of_clips``."""
        kept = self.keeps_condition(epoch, rows)
        own = self.index.clips["text_tokens"][rows].astype(np.int64)
        shown = kept & (own > 0)
        text = np.zeros_like(own) if self.null_text_tokens is None else np.where(shown, own, self.null_text_tokens)
        return PackDraws(self.of_clips(epoch, rows, u_time), kept, shown, text)

    def keeps_condition(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which clips are trained with their class and text, bool [B] for rows [B]."""
        ids = self.index.clips["clip_id"][rows]
        u_dropout = rng.uniforms(self.seed, Stream.CONDITION_DROPOUT, epoch=epoch, clip=ids)[..., 0]
        return u_dropout >= self.process.condition_dropout

    @property
    def most_text_tokens(self) -> NDArray[np.int64]:
        """The most text tokens that each clip of the index has in any epoch, int64 [M]."""
        own = self.index.clips["text_tokens"].astype(np.int64)
        return np.zeros_like(own) if self.null_text_tokens is None else np.maximum(own, self.null_text_tokens)


def pack_digests(packs: Sequence[PackPlan], draws: PackDraws, clip_ids: NDArray[np.uint64]) -> list[str]:
    """SHA-256 of each pack: its clips in order, their times, roles, and delays, and which keep their condition.

    Args:
        packs: Packs of one epoch.
        draws: Draws of all clips of the packs, pack after pack.
        clip_ids: Ids of the same clips.

    Returns:
        One hex digest per pack.
    """
    clips = draws.clips
    inside = np.arange(clips.roles.shape[1]) < clips.num_frames.numpy()[:, None]
    drawn = np.where(clips.visible.numpy(), clips.roles.numpy(), -2 - clips.roles.numpy()).astype(np.int8)
    time, delay = clips.global_time.numpy(), clips.delay.numpy()
    digests, at = [], 0
    for pack in packs:
        here = slice(at, at + len(pack.rows))
        digest = hashlib.sha256(f"{pack.epoch} {pack.number} {len(pack.rows)};".encode())
        real = inside[here]
        for array in (
            clip_ids[here], time[here], draws.keeps_condition[here], real.sum(axis=1), drawn[here][real],
            delay[here][real],
        ):  # fmt: skip
            digest.update(np.ascontiguousarray(array).tobytes())
        digests.append(digest.hexdigest())
        at = here.stop
    return digests
