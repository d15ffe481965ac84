"""The plan: which clips every step sees, in which packs, with which draws.

A pure function of its fingerprint (seed, index, sizes, process, quarantine list) and the epoch. Every rank computes
the same plan without communication, for any world size, and a resumed run computes its own step instead of replaying
those before: the only state is a ``Cursor``. A step is offered the clips that the one before carried over and the next
clips in the epoch's order, until they reach ``(1 - headroom) * packs_per_step * token_budget`` visible tokens (the clip
that crosses this limit is the last one offered), and spreads them over its packs. A clip that finds no room is carried
into the next step (``epoch.py`` says with which precedence, and how a large epoch is planned in segments). No clip is
dropped, cut or repeated in an epoch, and only its last step may be short.

Shape legend: ``K`` clips of the epoch, ``k`` clips of a pack, ``G`` packs of a step, ``B, N`` as in ``flow``.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from flowception import rng
from flowception.data.epoch import ClipCosts, EpochSteps, StepSizes, give_back_freed_memory
from flowception.data.expected_tokens import TOKEN_UNITS, token_moments
from flowception.data.order import epoch_order, repeat_ids, stratified_uniforms, times_shown
from flowception.data.pack_shape import static_shape
from flowception.data.step_plan import Cursor, PackPlan, PlanConfig, StepPlan
from flowception.errors import DataError, PlanError
from flowception.flow.extended_time import ClipDraws, ProcessConfig, draw_clips
from flowception.flow.loss import denominators, expected_counts
from flowception.packing.balance import imbalance
from flowception.packing.flops import TRAINING_PASSES, ModelSpec, clip_flops
from flowception.packing.layout import PackShape
from flowception.rng import Stream
from flowception.shards.index import ClipIndex

_KEPT_EPOCHS = 2
_CHUNK_PLACES = 8192
_NOT_PLANNED = {"insertion_loss_weight"}


def _digest(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


class Plan:
    """Plans every epoch of a run."""

    def __init__(
        self,
        index: ClipIndex,
        rows: NDArray[np.signedinteger] | None,
        config: PlanConfig,
        flop_spec: ModelSpec,
        seed: int,
        quarantine: Iterable[str] = (),
        *,
        null_text_tokens: int = 0,
    ) -> None:
        """Make a plan.

        Args:
            index: The set's index.
            rows: Rows to train on (a part of ``index.split``); None for all.
            config: Sizes and process: an object that is both a ``PlanConfig`` and a ``ProcessConfig``.
            flop_spec: Sizes of the network, for balancing and to know whether text is used.
            seed: The run's seed.
            quarantine: Keys of clips left out, found bad in earlier epochs.
            null_text_tokens: Length of the set's null text, which a clip without a caption or condition brings.

        Raises:
            DataError: If there is no clip.
            PlanError: If a clip is longer than a pack, or has a class the network lacks.
        """
        if not isinstance(config, ProcessConfig):
            raise PlanError(f"a plan needs a config that is also a ProcessConfig, got {type(config).__name__}")
        PlanConfig.__post_init__(config)  # a subclass of several configs may have skipped it
        self.index, self.config, self.flop_spec, self.seed = index, config, flop_spec, seed
        self.process: ProcessConfig = config
        self.null_text_tokens = null_text_tokens
        self.quarantine = tuple(sorted(set(quarantine)))
        # 32 bits here and below: every rank of a node keeps such arrays of the whole set.
        self._all_rows = np.arange(len(index), dtype=np.int32) if rows is None else np.asarray(rows, dtype=np.int32)
        left_out = index.rows_of(self.quarantine)
        self.rows = self._all_rows[~np.isin(self._all_rows, left_out)] if len(left_out) else self._all_rows
        self._check()
        self._epochs: OrderedDict[int, tuple[NDArray[np.int32], EpochSteps]] = OrderedDict()
        self._counted: tuple[int, int] | None = None
        self._lock = threading.RLock()  # a thread plans ahead of the one that trains

    def with_quarantine(self, keys: Iterable[str]) -> Plan:
        """The same plan without the given clips as well; for the next epoch."""
        left_out = {*self.quarantine, *keys}
        null = self.null_text_tokens
        return Plan(self.index, self._all_rows, self.config, self.flop_spec, self.seed, left_out, null_text_tokens=null)

    @property
    def uses_text(self) -> bool:
        """Whether text tokens are part of packs."""
        return self.flop_spec.text_dim is not None

    def shows_caption(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which clips of an epoch are trained with their own text, bool [B] for rows [B]; others with the null text."""
        return self.keeps_condition(epoch, rows) & (self.index.clips["text_tokens"][rows] > 0)

    def text_tokens(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Text tokens that clips bring into a pack of an epoch, int64 [B] for rows [B]; 0 for a network without text.

        A clip without a caption, or trained without its condition, brings the null text, so that it looks exactly like
        an unconditional clip of the sampler. Which clips these are is drawn ahead, so the count is exact.
        """
        if not self.uses_text:
            return np.zeros(len(rows), np.int64)
        own = self.index.clips["text_tokens"][rows].astype(np.int64)
        return np.where(self.shows_caption(epoch, rows), own, self.null_text_tokens)

    def _most_text_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same at most, in any epoch."""
        own = self.index.clips["text_tokens"][rows].astype(np.int64)
        return np.maximum(own, self.null_text_tokens) if self.uses_text else np.zeros_like(own)

    def _full_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        frames = self.index.clips["frames"][rows].astype(np.int64)
        return self._most_text_tokens(rows) + frames * self.index.tokens_per_frame[rows]

    def _check(self) -> None:
        if not len(self.rows):
            raise DataError(
                f"there is no clip to train on: the set has {len(self.index)}, this part {len(self._all_rows)}, "
                f"{len(self.quarantine)} are quarantined; encode more clips or lower data.heldout_fraction"
            )
        full, budget = self._full_tokens(np.arange(len(self.index))), self.config.token_budget
        worst = int(np.argmax(full))
        if full[worst] > budget:
            tokens, text = int(self.index.tokens_per_frame[worst]), int(self._most_text_tokens(np.array([worst]))[0])
            raise PlanError(
                f"clip {self.index.key(worst)} has {full[worst]} tokens ({self.index.clips['frames'][worst]} frames of "
                f"{tokens}, {text} of text) and token_budget is {budget}; set token_budget={full[worst]} or more, "
                f"or encode clips of at most {max(0, budget - text) // tokens} latent frames"
            )
        classes, label = self.flop_spec.num_classes, int(self.index.clips["class_label"].max())
        if classes and label >= classes:
            raise PlanError(f"the set has class label {label}; set the model's num_classes={label + 1} or more")

    @cached_property
    def pack_shape(self) -> PackShape:
        """Static sizes of every pack, from the whole index: the same for training and held-out parts."""
        clips, every = self.index.clips, np.arange(len(self.index))
        frames, tokens = clips["frames"].astype(np.int64), self.index.tokens_per_frame.astype(np.int64)
        return static_shape(self.config.token_budget, frames, tokens, self._most_text_tokens(every))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that the plan depends on, hex."""
        config = {f.name: getattr(self.config, f.name) for f in fields(PlanConfig)}
        process = {f.name: getattr(self.process, f.name) for f in fields(ProcessConfig) if f.name not in _NOT_PLANNED}
        process["tasks"] = self.process.task_probabilities().tolist()
        content = {
            "version": 5,
            "seed": self.seed,
            "index": self.index.fingerprint(),
            "rows": _digest(self._all_rows.astype("<i8")),
            "quarantine": self.quarantine,
            "weights": None if self.index.weights is None else _digest(self.index.weights.astype("<f8")),
            "plan": config,
            "process": process,
            "network": asdict(self.flop_spec),
            "null_text_tokens": self.null_text_tokens,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def draws(
        self,
        epoch: int,
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        u_time: NDArray[np.float64] | None = None,
    ) -> ClipDraws:
        """The draws of some clips of an epoch; a clip's are the same whatever else is asked for.

        Args:
            epoch: Epoch number.
            rows: [B] rows in the index.
            places: [B] their places in the epoch's order.
            u_time: [B] uniforms for the global times; None for the plan's own, stratified over places.

        Returns:
            Draws, in the order given.
        """
        ids, frames = self.index.clips["clip_id"][rows], self.index.clips["frames"][rows].astype(np.int64)
        if u_time is None:
            u_time = self._u_time(epoch, places)
        u_task = rng.uniforms(self.seed, Stream.TASK, epoch=epoch, clip=ids)[..., 0]
        slots = np.arange(int(frames.max(initial=0)))
        u_frame = rng.uniforms(self.seed, Stream.FRAME, epoch=epoch, clip=ids[:, None], frame=slots)
        return draw_clips(self.process, frames, u_time, u_task, u_frame)

    def _u_time(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.float64]:
        block_clips = self.config.time_block_clips
        num_places = self._num_places(epoch)
        return stratified_uniforms(places, num_places, seed=self.seed, epoch=epoch, block_clips=block_clips)

    def _times_shown(self, epoch: int) -> NDArray[np.int64]:
        """How often an epoch shows each of ``rows``: once, or what the weights of a mixture say."""
        if self.index.weights is None:
            return np.ones(len(self.rows), np.int64)
        ids = self.index.clips["clip_id"][self.rows]
        uniforms = rng.uniforms(self.seed, Stream.ORDER, epoch=epoch, clip=ids)[..., 1]
        return times_shown(self.index.weights[self.rows], uniforms)

    def _num_places(self, epoch: int) -> int:
        if self.index.weights is None:
            return len(self.rows)
        if self._counted is None or self._counted[0] != epoch:
            self._counted = (epoch, int(self._times_shown(epoch).sum()))
        return self._counted[1]

    def keeps_condition(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which clips of an epoch are trained with their class and text, bool [B] for rows [B]; the rest without."""
        ids = self.index.clips["clip_id"][rows]
        u_dropout = rng.uniforms(self.seed, Stream.CONDITION_DROPOUT, epoch=epoch, clip=ids)[..., 0]
        return u_dropout >= self.process.condition_dropout

    def _costs(self, epoch: int, rows: NDArray[np.int64], places: NDArray[np.int64]) -> ClipCosts:
        draws, clips = self.draws(epoch, rows, places), self.index.clips
        height, width = clips["height"][rows].astype(np.int64), clips["width"][rows].astype(np.int64)
        visible, text = draws.visible_frames.numpy(), self.text_tokens(epoch, rows)
        per_frame = self.index.tokens_per_frame[rows]
        latent_and_insertion = (visible * per_frame).astype(np.int64)
        velocity, insertion = expected_counts(
            draws.roles,
            torch.from_numpy(self.flop_spec.in_channels * height * width),
            self.process.schedule(),
            self.process.delay_law,
        )
        return ClipCosts(
            tokens=text + latent_and_insertion,
            flops=clip_flops(self.flop_spec, visible, height, width, text),
            attention_pairs=latent_and_insertion.astype(np.float64) ** 2,
            full_attention_pairs=(clips["frames"][rows] * per_frame).astype(np.float64) ** 2,
            velocity=velocity.numpy(),
            insertion=insertion.numpy(),
        )

    @cached_property
    def _token_moments(self) -> tuple[NDArray[np.int32], float]:
        """Mean of the visible tokens of each clip of the index, in parts of ``TOKEN_UNITS``; most variance a token."""
        clips = self.index.clips
        text = clips["text_tokens"].astype(np.int64) if self.uses_text else np.zeros(len(clips), np.int64)
        null = self.null_text_tokens if self.uses_text else 0
        frames = clips["frames"].astype(np.int64)
        mean, variance = token_moments(self.process, frames, self.index.tokens_per_frame, text, null)
        return mean.astype(np.int32), TOKEN_UNITS * float((variance / mean).max())

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int32], EpochSteps]:
        """Rows by place, and steps, of an epoch; the last few are kept."""
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        clips, config = self.index.clips, self.config
        times = self._times_shown(epoch)
        rows = np.repeat(self.rows, times)
        ids, shards, block = repeat_ids(clips["clip_id"][self.rows], times), clips["shard"], config.shuffle_block_shards
        by_place = epoch_order(
            ids, shards[rows], int(shards.max()) + 1, seed=self.seed, epoch=epoch, shuffle_block_shards=block
        )
        order = rows[by_place]
        mean, variance_per_token = self._token_moments
        steps = EpochSteps(
            mean[order],
            variance_per_token,
            self.pack_shape.max_seqlen,
            lambda places: self._costs(epoch, order[places].astype(np.int64), places),
            StepSizes(config.token_budget, config.packs_per_step, config.headroom),
        )
        self._epochs[epoch] = (order, steps)
        if len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        give_back_freed_memory()
        return order, steps

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({**state, "_lock": threading.RLock()})

    def plan_left_over(self, epoch: int) -> None:
        """Do a little of the work that an epoch's end needs of its earlier segments, if any is left to do."""
        with self._lock:
            self._epoch(epoch)[1].plan_left_over()

    def steps_in_epoch(self, epoch: int) -> int:
        """How many steps an epoch has."""
        with self._lock:
            return self._epoch(epoch)[1].count()

    def mean_step_flops(self, epoch: int) -> float:
        """FLOPs of forward and backward of an epoch's steps, the mean: every clip counts once."""
        with self._lock:
            order, steps = self._epoch(epoch)
            count = steps.count()
        chunks = np.array_split(np.arange(len(order)), -(-len(order) // _CHUNK_PLACES))
        flops = sum(float(self._costs(epoch, order[c].astype(np.int64), c).flops.sum()) for c in chunks)
        return TRAINING_PASSES * flops / count

    def step(self, cursor: Cursor) -> StepPlan:
        """Plan one step.

        Args:
            cursor: Which.

        Returns:
            Its packs and figures.

        Raises:
            PlanError: If the epoch has no such step.
        """
        if min(cursor.epoch, cursor.step) < 0:
            raise PlanError(f"there is no step {cursor.step} of epoch {cursor.epoch}; both are counted from 0")
        with self._lock:
            order, steps = self._epoch(cursor.epoch)
            found = steps.step(cursor.step)
        if found is None:
            raise PlanError(f"epoch {cursor.epoch} has {steps.count()} steps, there is no step {cursor.step}")
        costs, config = found.costs, self.config
        tokens, edges = int(costs.tokens.sum()), np.cumsum([0, *map(len, found.packs)])
        divisors = denominators(costs.velocity, costs.insertion)
        return StepPlan(
            plan=self,
            epoch=cursor.epoch,
            step=cursor.step,
            packs=[
                PackPlan(cursor.epoch, number, order[pack].astype(np.int64), pack)
                for number, pack in enumerate(found.packs)
            ],
            velocity_denominator=divisors.velocity,
            insertion_denominator=divisors.insertion,
            clips=len(costs.tokens),
            tokens=tokens,
            fill=tokens / (config.packs_per_step * config.token_budget),
            flops=float(TRAINING_PASSES * costs.flops.sum()),
            flops_imbalance=imbalance(np.diff(np.append(0.0, np.cumsum(costs.flops))[edges])),
            attention_ratio=float(costs.attention_pairs.sum() / costs.full_attention_pairs.sum()),
        )

    def next(self, cursor: Cursor) -> Cursor:
        """The step after ``cursor``: in the same epoch, or the first of the next."""
        with self._lock:
            goes_on = self._epoch(cursor.epoch)[1].has(cursor.step + 1)
        return Cursor(cursor.epoch, cursor.step + 1) if goes_on else Cursor(cursor.epoch + 1, 0)

    def pack_digests(self, packs: Sequence[PackPlan]) -> list[str]:
        """SHA-256 of each pack: its clips in order, their times, roles and delays, and which lose their condition.

        Args:
            packs: Packs of one epoch.

        Returns:
            One digest for each.
        """
        if not packs:
            return []
        rows, places = np.concatenate([p.rows for p in packs]), np.concatenate([p.places for p in packs])
        epoch = packs[0].epoch
        u_time = np.concatenate([self._u_time(epoch, p.places) if p.u_time is None else p.u_time for p in packs])
        draws = self.draws(epoch, rows, places, u_time)
        inside = np.arange(draws.roles.shape[1]) < draws.num_frames.numpy()[:, None]
        drawn = np.where(draws.visible.numpy(), draws.roles.numpy(), -2 - draws.roles.numpy()).astype(np.int8)
        ids, time, delay = self.index.clips["clip_id"][rows], draws.global_time.numpy(), draws.delay.numpy()
        kept = self.keeps_condition(epoch, rows)
        digests, at = [], 0
        for pack in packs:
            here = slice(at, at + len(pack.rows))
            digest = hashlib.sha256(f"{pack.epoch} {pack.number} {len(pack.rows)};".encode())
            real = inside[here]
            for array in (
                ids[here], time[here], kept[here], real.sum(axis=1), drawn[here][real], delay[here][real],
            ):  # fmt: skip
                digest.update(np.ascontiguousarray(array).tobytes())
            digests.append(digest.hexdigest())
            at = here.stop
        return digests
