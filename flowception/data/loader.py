"""Feeding one rank: its packs of every step of an epoch, from any cursor, with or without worker processes.

Rank r of W runs ``ceil(G / W)`` micro-steps; its micro-step a is pack ``a W + r``, so packs that run at the same time
are neighbors in FLOPs. Packs that do not exist are padding. A thread plans ahead; workers only read and build what
they are told, so nothing about them has to be saved: a cursor is the whole state, that of the last step handed out.
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
"""A worker that gives nothing for so long is dead or its storage is."""

_CLIPS_NAMED = 3
"""Clips that ``waiting_for`` names."""


@dataclass
class StepBatch:
    """What one rank does in one optimizer step."""

    step_plan: StepPlan
    packs: list[Pack]
    """The rank's micro-steps, ``ceil(G / W)`` of them."""
    cursor: Cursor
    """This step."""
    next_cursor: Cursor
    """Where to go on after it; save this one."""
    quarantined: list[BadClip]
    """Clips of this rank's packs found bad in this step, or left out."""


def packs_of_rank(packs: Sequence[PackPlan], rank: int, world_size: int) -> list[PackPlan | None]:
    """A rank's share of a step, one entry for each micro-step; None where there is only padding to run."""
    micro_steps = -(-len(packs) // world_size)
    numbers = [micro_step * world_size + rank for micro_step in range(micro_steps)]
    return [packs[number] if number < len(packs) else None for number in numbers]


class _PackBuilder(Dataset[list[Pack] | SentPacks]):
    """Builds packs that are named by their plans, and gathers them for sending when it runs in a worker."""

    def __init__(self, plan: Plan, reader: ClipReader, left_out: Mapping[str, str]) -> None:
        self._plan, self._reader, self._left_out = plan, reader, left_out

    def __getitem__(self, share: Any) -> list[Pack] | SentPacks:
        packs = [self._build(pack) for pack in share]
        return packs if get_worker_info() is None else SentPacks.of(packs)

    def _build(self, pack: PackPlan | None) -> Pack:
        return empty_pack(self._plan) if pack is None else build_pack(self._plan, pack, self._reader, self._left_out)


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(worker: int) -> None:
    """Leave the signals that ask a run to stop to the training process.

    Slurm sends them to every process of a task, and that one still needs the worker to finish its step and save.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class PackLoader:
    """The steps of one epoch for one rank, from a cursor to the epoch's end."""

    def __init__(
        self,
        plan: Plan,
        reader: ClipReader,
        rank: int = 0,
        world_size: int = 1,
        cursor: Cursor | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        left_out: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Make a loader; nothing is read before it is iterated.

        Args:
            plan: The plan, the same on every rank.
            reader: Where clips are read.
            rank: This rank.
            world_size: Number of ranks.
            cursor: The first step; None for the first of epoch 0.
            num_workers: Processes that read ahead; 0 for none.
            prefetch: Steps that each worker keeps ready.
            left_out: Keys of clips that become padding in their places, with the reason.
        """
        check_world_size(plan.sizes.packs_per_step, world_size)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be an integer from 0 to {world_size - 1}, got {rank}")
        self._plan, self._reader = plan, reader
        self._rank, self._world_size = rank, world_size
        self._first = cursor or Cursor()
        self._num_workers, self._prefetch, self._left_out = num_workers, prefetch, left_out
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
            _PackBuilder(self._plan, self._reader, self._left_out),
            batch_size=None,
            sampler=self._shares(),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            worker_init_fn=_begin_worker,
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
        """What the next batch needs, for a person who waits for it; may be called from another thread."""
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
