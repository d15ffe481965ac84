"""Loading one rank's packs for every step of an epoch, from any cursor, with or without worker processes.

Rank r of W runs ``ceil(G / W)`` micro-steps; its micro-step a is pack ``a W + r``, so packs that run at the same time
have similar FLOPs. Missing packs are padding. A thread plans ahead. Workers only read and build the packs they receive,
so none of their state needs saving: the cursor of the last step returned is the complete state.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from flowception.data.pack import BadClip, Pack, build_pack, empty_pack
from flowception.data.plan import Plan
from flowception.data.prefetch import Planned, steps_ahead
from flowception.data.shared_memory import SentPacks
from flowception.data.step_plan import Cursor, PackPlan, StepPlan, check_world_size
from flowception.errors import ConfigError
from flowception.shards.reader import ClipReader

_WORKER_TIMEOUT_S = 1800
"""Time without a batch after which a worker, or its storage, counts as dead."""

_CLIPS_NAMED = 3
"""Most clips that ``waiting_for`` names."""


@dataclass
class StepBatch:
    """One rank's share of one optimizer step."""

    step_plan: StepPlan
    packs: list[Pack]
    """The rank's micro-steps, ``ceil(G / W)`` of them."""
    cursor: Cursor
    """This step."""
    next_cursor: Cursor
    """The step to continue with; save this one."""
    quarantined: list[BadClip]
    """Clips of this rank's packs that were found bad in this step, or skipped on request."""


def packs_of_rank(packs: Sequence[PackPlan], rank: int, world_size: int) -> list[PackPlan | None]:
    """A rank's share of a step, one entry per micro-step; None for a micro-step of padding."""
    micro_steps = -(-len(packs) // world_size)
    numbers = [micro_step * world_size + rank for micro_step in range(micro_steps)]
    return [packs[number] if number < len(packs) else None for number in numbers]


class _PackBuilder(Dataset[list[Pack] | SentPacks]):
    """Builds packs from their plans; in a worker, also gathers them into shared memory."""

    def __init__(self, plan: Plan, reader: ClipReader, skipped: Mapping[str, str]) -> None:
        self._plan, self._reader, self._skipped = plan, reader, skipped

    def __getitem__(self, share: Any) -> list[Pack] | SentPacks:
        packs = [self._build(pack) for pack in share]
        return packs if get_worker_info() is None else SentPacks.of(packs)

    def _build(self, pack: PackPlan | None) -> Pack:
        return empty_pack(self._plan) if pack is None else build_pack(self._plan, pack, self._reader, self._skipped)


def _unchanged(item: Any) -> Any:
    return item


def _ignore_stop_signals(worker: int) -> None:
    """Ignore the signals that request a run to stop; the training process handles them.

    Slurm sends them to every process of a task, and the training process still needs its workers to finish the step.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class PackLoader:
    """Iterates over the steps of one epoch for one rank, from a cursor to the end of the epoch."""

    def __init__(
        self,
        plan: Plan,
        reader: ClipReader,
        rank: int = 0,
        world_size: int = 1,
        cursor: Cursor | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        skipped: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Make a loader; nothing is read before iteration.

        Args:
            plan: The plan, the same on every rank.
            reader: Reader of the clips.
            rank: This rank.
            world_size: Number of ranks.
            cursor: The first step; None for the first step of epoch 0.
            num_workers: Reader processes; 0 reads in this process.
            prefetch: Steps that each worker prefetches.
            skipped: Keys of clips to replace with padding, with the reason.

        Raises:
            ConfigError: If there are more ranks than packs per step, or no such rank.
        """
        check_world_size(plan.sizes.packs_per_step, world_size)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be an integer from 0 to {world_size - 1}, got {rank}")
        self._plan, self._reader = plan, reader
        self._rank, self._world_size = rank, world_size
        self._first = cursor or Cursor()
        self._num_workers, self._prefetch, self._skipped = num_workers, prefetch, skipped
        self._planned: deque[Planned] = deque()
        self._handed_out = 0

    def _shares(self) -> Iterator[list[PackPlan | None]]:
        for step_plan, next_cursor in steps_ahead(self._plan, self._first, self._prefetch):
            self._planned.append((step_plan, next_cursor))
            share = packs_of_rank(step_plan.packs, self._rank, self._world_size)
            for pack in share:
                if pack is not None:
                    self._reader.prefetch(pack.rows)
            yield share

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps in order."""
        self._planned.clear()
        self._handed_out = 0
        built = DataLoader(
            _PackBuilder(self._plan, self._reader, self._skipped),
            batch_size=None,
            sampler=self._shares(),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            worker_init_fn=_ignore_stop_signals,
            timeout=_WORKER_TIMEOUT_S if self._num_workers else 0,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),
        )
        for sent in built:
            packs = sent.packs() if isinstance(sent, SentPacks) else sent
            step_plan, next_cursor = self._planned.popleft()
            self._handed_out += 1
            found = [bad for pack in packs for bad in pack.bad_clips]
            yield StepBatch(step_plan, packs, Cursor(step_plan.epoch, step_plan.step), next_cursor, found)

    def waiting_for(self) -> str:
        """Describe what the next batch is waiting for; may be called from another thread."""
        try:
            step_plan, _ = self._planned[0]
        except IndexError:
            return "the plan for the next step"
        share = packs_of_rank(step_plan.packs, self._rank, self._world_size)
        rows = [int(row) for pack in share if pack is not None for row in pack.rows]
        where = ", ".join(self._reader.describe(row) for row in rows[:_CLIPS_NAMED])
        more = f" and {len(rows) - _CLIPS_NAMED} more" if len(rows) > _CLIPS_NAMED else ""
        worker = f", read by worker {self._handed_out % self._num_workers}" if self._num_workers else ""
        return f"step {step_plan.step} of epoch {step_plan.epoch}: {where or 'padding'}{more}{worker}"
