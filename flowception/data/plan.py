"""The plan: the clips of every step, their packs, and their draws.

It is a pure function of its fingerprint (seed, index, sizes, process, quarantine list) and the epoch. Every rank
computes the same plan without communication, for any world size. A resumed run computes its next step without replaying
earlier ones: the only state is a ``Cursor``. A step is offered the clips carried over from the step before, then the
next clips in order, until they reach ``(1 - headroom) * packs_per_step * token_budget`` visible tokens (the clip that
crosses this limit is the last one offered). It spreads them over its packs, and carries clips that do not fit into the
next step (``epoch.py`` has the precedence, and the segments of a large epoch). No clip is dropped, cut, or repeated in
an epoch, and only its last step may be short.
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
from flowception.data.epoch import EpochSteps, return_freed_memory
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
            rows: Rows to train on (one side of ``index.split``); None for all.
            process: The process that clips are drawn from.
            sizes: Sizes of packs and steps.
            spec: Sizes of the network, for balancing and for whether text is used.
            seed: The run's seed.
            quarantine: Keys of clips to skip, found bad in earlier epochs.
            null_text_tokens: Length of the set's null text, used by clips without a caption or condition.

        Raises:
            DataError: If there are no clips.
            PlanError: If a clip is longer than a pack, or has a class the network lacks.
        """
        self.index, self.process, self.sizes, self.spec, self.seed = index, process, sizes, spec, seed
        self.null_text_tokens = null_text_tokens
        self._draws = EpochDraws(index, process, seed, null_text_tokens if spec.text_dim is not None else None)
        self.quarantine = tuple(sorted(set(quarantine)))
        # 32 bits here and below, because every rank of a node keeps such arrays for all clips of the set.
        self._all_rows = np.arange(len(index), dtype=np.int32) if rows is None else np.asarray(rows, dtype=np.int32)
        skipped = index.rows_of(self.quarantine)
        self.rows = self._all_rows[~np.isin(self._all_rows, skipped)] if len(skipped) else self._all_rows
        self._check()
        self._order = EpochOrder(index, self.rows, sizes, seed)
        self._epochs: OrderedDict[int, tuple[NDArray[np.int32], EpochSteps]] = OrderedDict()
        self._lock = threading.RLock()  # another thread plans ahead of training

    def with_quarantine(self, keys: Iterable[str]) -> Plan:
        """The same plan with more clips skipped, for the next epoch."""
        return Plan(
            self.index,
            self._all_rows,
            self.process,
            self.sizes,
            self.spec,
            self.seed,
            {*self.quarantine, *keys},
            null_text_tokens=self.null_text_tokens,
        )

    def _check(self) -> None:
        if not len(self.rows):
            raise DataError(
                f"no clips to train on: {len(self.index)} in the set, {len(self._all_rows)} in this split, "
                f"{len(self.quarantine)} quarantined; encode more clips or lower data.heldout_fraction"
            )
        check_clips_fit(self.index, self._draws.most_text_tokens, self.sizes.token_budget)
        classes, label = self.spec.num_classes, int(self.index.clips["class_label"].max())
        if classes and label >= classes:
            raise PlanError(f"model.num_classes must be at least {label + 1} for the set's class labels, got {classes}")

    @cached_property
    def pack_shape(self) -> PackShape:
        """Static sizes of every pack, from the complete index, so training and held-out packs have the same."""
        return static_shape(self.index, self._draws.most_text_tokens, self.sizes.token_budget)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that the plan depends on."""
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
        """All draws for the clips of a pack. A clip's draws do not depend on the other clips."""
        return self._draws.of_pack(pack.epoch, pack.rows, self._u_time(pack))

    def pack_digests(self, packs: Sequence[PackPlan]) -> list[str]:
        """SHA-256 of each of some packs of one epoch, over their clips and draws."""
        if not packs:
            return []
        rows, u_time = np.concatenate([p.rows for p in packs]), np.concatenate([self._u_time(p) for p in packs])
        draws = self._draws.of_pack(packs[0].epoch, rows, u_time)
        return pack_digests(packs, draws, self.index.clips["clip_id"][rows])

    def order_hash(self, step: StepPlan) -> str:
        """SHA-256 of a step's clips, draws, and packs. Independent of the number of ranks."""
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
        """Mean visible tokens of each clip, in units of ``1 / TOKEN_UNITS`` token; largest variance per token."""
        mean, variance = token_moments(self.process, self.index, self._draws.null_text_tokens)
        return mean.astype(np.int32), TOKEN_UNITS * float((variance / mean).max())

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int32], EpochSteps]:
        """Rows by place, and steps, of an epoch; the last few epochs are cached."""
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
        return_freed_memory()
        return order, steps

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({**state, "_lock": threading.RLock()})

    def plan_leftovers(self, epoch: int) -> None:
        """Plan one earlier segment whose leftover clips the end of the epoch needs, if any remains."""
        with self._lock:
            self._epoch(epoch)[1].plan_leftovers()

    def steps_in_epoch(self, epoch: int) -> int:
        """Number of steps in an epoch."""
        with self._lock:
            return self._epoch(epoch)[1].count()

    def mean_step_flops(self, epoch: int) -> float:
        """Mean FLOPs of forward and backward over an epoch's steps."""
        with self._lock:
            order, steps = self._epoch(epoch)
            count = steps.count()
        chunks = np.array_split(np.arange(len(order)), -(-len(order) // _CHUNK_PLACES))
        flops = sum(float(self._costs(epoch, order[c].astype(np.int64), c).flops.sum()) for c in chunks)
        return TRAINING_PASSES * flops / count

    def step(self, cursor: Cursor) -> StepPlan:
        """Plan one step.

        Args:
            cursor: The step.

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
            continues = self._epoch(cursor.epoch)[1].has(cursor.step + 1)
        return Cursor(cursor.epoch, cursor.step + 1) if continues else Cursor(cursor.epoch + 1, 0)
