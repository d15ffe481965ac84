"""The plan: which clips every step sees, in which packs, with which draws.

A pure function of its fingerprint (seed, index, sizes, process, quarantine list) and the epoch. Every rank computes
the same plan without communication, for any world size, and a resumed run computes its own step instead of replaying
those before: the only state is a ``Cursor``. A step is offered the clips that the one before carried over and the next
clips in the epoch's order, until they reach ``(1 - headroom) * packs_per_step * token_budget`` visible tokens (the clip
that crosses this limit is the last one offered), and spreads them over its packs. A clip that finds no room is carried
into the next step (``epoch.py`` says with which precedence, and how a large epoch is planned in segments). No clip is
dropped, cut or repeated in an epoch, and only its last step may be short.
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
from numpy.typing import NDArray

from flowception.data.clip_costs import ClipCosts, clip_costs
from flowception.data.draws import EpochDraws, PackDraws, pack_digests
from flowception.data.epoch import EpochSteps, give_back_freed_memory
from flowception.data.expected_tokens import TOKEN_UNITS, token_moments
from flowception.data.order import EpochOrder
from flowception.data.pack_shape import check_clips_fit, static_shape
from flowception.data.step_plan import Cursor, PackPlan, PlanConfig, StepPlan, combine_digests
from flowception.errors import DataError, PlanError
from flowception.flow.extended_time import ProcessConfig
from flowception.flow.loss import denominators
from flowception.packing.balance import imbalance
from flowception.packing.flops import TRAINING_PASSES, ModelSpec
from flowception.packing.layout import PackShape
from flowception.shards.index import ClipIndex

_KEPT_EPOCHS, _CHUNK_PLACES = 2, 8192
_NOT_PLANNED = {"insertion_loss_weight"}


def _digest(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


class Plan:
    """Plans every epoch of a run."""

    def __init__(
        self,
        index: ClipIndex,
        rows: NDArray[np.signedinteger] | None,
        process: ProcessConfig,
        sizes: PlanConfig,
        spec: ModelSpec,
        seed: int,
        quarantine: Iterable[str] = (),
        *,
        null_text_tokens: int = 0,
    ) -> None:
        """Make a plan.

        Args:
            index: The set's index.
            rows: Rows to train on (a part of ``index.split``); None for all.
            process: What is drawn for a clip.
            sizes: Of packs and steps.
            spec: Sizes of the network, for balancing and to know whether text is used.
            seed: The run's seed.
            quarantine: Keys of clips left out, found bad in earlier epochs.
            null_text_tokens: Length of the set's null text, which a clip without a caption or condition brings.

        Raises:
            DataError: If there is no clip.
            PlanError: If a clip is longer than a pack, or has a class the network lacks.
        """
        self.index, self.process, self.sizes, self.spec, self.seed = index, process, sizes, spec, seed
        self.null_text_tokens = null_text_tokens
        self._draws = EpochDraws(index, process, seed, null_text_tokens if spec.text_dim is not None else None)
        self.quarantine = tuple(sorted(set(quarantine)))
        # 32 bits here and below: every rank of a node keeps such arrays of the whole set.
        self._all_rows = np.arange(len(index), dtype=np.int32) if rows is None else np.asarray(rows, dtype=np.int32)
        left_out = index.rows_of(self.quarantine)
        self.rows = self._all_rows[~np.isin(self._all_rows, left_out)] if len(left_out) else self._all_rows
        self._check()
        self._order = EpochOrder(index, self.rows, sizes, seed)
        self._epochs: OrderedDict[int, tuple[NDArray[np.int32], EpochSteps]] = OrderedDict()
        self._lock = threading.RLock()  # a thread plans ahead of the one that trains

    def with_quarantine(self, keys: Iterable[str]) -> Plan:
        """The same plan without the given clips as well; for the next epoch."""
        what, null = (self.process, self.sizes, self.spec, self.seed), self.null_text_tokens
        return Plan(self.index, self._all_rows, *what, {*self.quarantine, *keys}, null_text_tokens=null)

    def _check(self) -> None:
        if not len(self.rows):
            raise DataError(
                f"no clips to train on: {len(self.index)} in the set, {len(self._all_rows)} in this split, "
                f"{len(self.quarantine)} quarantined; encode more clips or lower data.heldout_fraction"
            )
        check_clips_fit(self.index, self._draws.most_text_tokens, self.sizes.token_budget)
        classes, label = self.spec.num_classes, int(self.index.clips["class_label"].max())
        if classes and label >= classes:
            raise PlanError(
                f"the set has class label {label}, but model.num_classes is {classes}; set "
                f"model.num_classes={label + 1} or more"
            )

    @cached_property
    def pack_shape(self) -> PackShape:
        """Static sizes of every pack, from the whole index: the same for training and held-out parts."""
        return static_shape(self.index, self._draws.most_text_tokens, self.sizes.token_budget)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that the plan depends on, hex."""
        process = {f.name: getattr(self.process, f.name) for f in fields(self.process) if f.name not in _NOT_PLANNED}
        content = {
            "version": 5,
            "seed": self.seed,
            "index": self.index.fingerprint(),
            "rows": _digest(self._all_rows.astype("<i8")),
            "quarantine": self.quarantine,
            "weights": None if self.index.weights is None else _digest(self.index.weights.astype("<f8")),
            "plan": asdict(self.sizes),
            "process": process | {"tasks": self.process.task_probabilities().tolist()},
            "network": asdict(self.spec),
            "null_text_tokens": self.null_text_tokens,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def clip_draws(self, pack: PackPlan) -> PackDraws:
        """All that is drawn for the clips of a pack; a clip's draws are the same in any company."""
        return self._draws.of_pack(pack.epoch, pack.rows, self._u_time(pack))

    def pack_digests(self, packs: Sequence[PackPlan]) -> list[str]:
        """SHA-256 of each of some packs of one epoch: their clips and all that is drawn for them."""
        if not packs:
            return []
        rows, u_time = np.concatenate([p.rows for p in packs]), np.concatenate([self._u_time(p) for p in packs])
        draws = self._draws.of_pack(packs[0].epoch, rows, u_time)
        return pack_digests(packs, draws, self.index.clips["clip_id"][rows])

    def order_hash(self, step: StepPlan) -> str:
        """SHA-256 of a step's clips, their draws and their packs. Knows nothing of ranks."""
        return combine_digests(self.pack_digests(step.packs))

    def keys(self, step: StepPlan) -> list[str]:
        """Keys of a step's clips, pack after pack."""
        return [self.index.key(int(row)) for pack in step.packs for row in pack.rows]

    def _u_time(self, pack: PackPlan) -> NDArray[np.float64]:
        return self._order.u_time(pack.epoch, pack.places) if pack.u_time is None else pack.u_time

    def _costs(self, epoch: int, rows: NDArray[np.int64], places: NDArray[np.int64]) -> ClipCosts:
        draws = self._draws.of_pack(epoch, rows, self._order.u_time(epoch, places))
        return clip_costs(self.index, rows, draws, self.process, self.spec)

    @cached_property
    def _token_moments(self) -> tuple[NDArray[np.int32], float]:
        """Mean of the visible tokens of each clip of the index, in parts of ``TOKEN_UNITS``; most variance a token."""
        mean, variance = token_moments(self.process, self.index, self._draws.null_text_tokens)
        return mean.astype(np.int32), TOKEN_UNITS * float((variance / mean).max())

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int32], EpochSteps]:
        """Rows by place, and steps, of an epoch; the last few are kept."""
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        order = self._order.rows_by_place(epoch)
        mean, variance_per_token = self._token_moments
        steps = EpochSteps(
            mean[order],
            variance_per_token,
            self.pack_shape.max_seqlen,
            lambda places: self._costs(epoch, order[places].astype(np.int64), places),
            self.sizes,
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
            raise PlanError(f"epoch and step must be >= 0, got epoch {cursor.epoch} and step {cursor.step}")
        with self._lock:
            order, steps = self._epoch(cursor.epoch)
            found = steps.step(cursor.step)
        if found is None:
            raise PlanError(f"step of epoch {cursor.epoch} must be less than {steps.count()}, got {cursor.step}")
        costs = found.costs
        tokens, edges = int(costs.tokens.sum()), np.cumsum([0, *map(len, found.packs)])
        divisors = denominators(costs.velocity, costs.insertion)
        return StepPlan(
            epoch=cursor.epoch,
            step=cursor.step,
            packs=[PackPlan(cursor.epoch, i, order[pack].astype(np.int64), pack) for i, pack in enumerate(found.packs)],
            velocity_denominator=divisors.velocity,
            insertion_denominator=divisors.insertion,
            clips=len(costs.tokens),
            tokens=tokens,
            fill=tokens / self.sizes.capacity,
            flops=float(TRAINING_PASSES * costs.flops.sum()),
            flops_imbalance=imbalance(np.diff(np.append(0.0, np.cumsum(costs.flops))[edges])),
            attention_ratio=float(costs.attention_pairs.sum() / costs.full_attention_pairs.sum()),
        )

    def next(self, cursor: Cursor) -> Cursor:
        """The step after ``cursor``: in the same epoch, or the first of the next."""
        with self._lock:
            goes_on = self._epoch(cursor.epoch)[1].has(cursor.step + 1)
        return Cursor(cursor.epoch, cursor.step + 1) if goes_on else Cursor(cursor.epoch + 1, 0)
