"""A table of a plan's steps, computed as each rank would compute them (``flowception plan``)."""

from __future__ import annotations

from typing import Any

from flowception.data.loader import packs_of_rank
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor, StepPlan, check_world_size, combine_digests
from flowception.errors import PlanError


def cursor_at(plan: Plan, step: int) -> Cursor:
    """The cursor of a run's step, counted from 0 over epochs."""
    epoch = 0
    while step >= plan.steps_in_epoch(epoch):
        step -= plan.steps_in_epoch(epoch)
        epoch += 1
    return Cursor(epoch, step)


def hash_from_ranks(plan: Plan, step_plan: StepPlan, world_size: int) -> str:
    """A step's order hash, combined from the ranks' packs, where each rank draws only its own.

    Args:
        plan: The plan.
        step_plan: A step of the plan.
        world_size: Number of ranks.

    Returns:
        The hash.

    Raises:
        PlanError: If the ranks' packs combined are not the step's packs.
    """
    digests: dict[int, str] = {}
    for rank in range(world_size):
        share = [pack for pack in packs_of_rank(step_plan.packs, rank, world_size) if pack is not None]
        for pack, digest in zip(share, plan.pack_digests(share)):
            if pack.number in digests:
                raise PlanError(f"pack {pack.number} of step {step_plan.step} is on two ranks of {world_size}")
            digests[pack.number] = digest
    if sorted(digests) != list(range(len(step_plan.packs))):
        raise PlanError(
            f"step {step_plan.step} has {len(step_plan.packs)} packs, but {world_size} ranks have {digests}"
        )
    return combine_digests([digests[number] for number in sorted(digests)])


def plan_table(plan: Plan, world_size: int, start: int, steps: int) -> list[dict[str, Any]]:
    """Figures of some steps of a run.

    Args:
        plan: The plan.
        world_size: Number of ranks to share the packs among.
        start: First step, counted from 0 over epochs.
        steps: Number of steps.

    Returns:
        Per step ``{step, order_hash, clips, tokens, fill, flops_imbalance, attention_ratio}``.
    """
    check_world_size(plan.sizes.packs_per_step, world_size)
    table, cursor = [], cursor_at(plan, start)
    for step in range(start, start + steps):
        found = plan.step(cursor)
        table.append(
            {
                "step": step,
                "order_hash": hash_from_ranks(plan, found, world_size),
                "clips": found.clips,
                "tokens": found.tokens,
                "fill": found.fill,
                "flops_imbalance": found.flops_imbalance,
                "attention_ratio": found.attention_ratio,
            }
        )
        cursor = plan.next(cursor)
    return table
