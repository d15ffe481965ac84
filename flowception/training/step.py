"""The micro-steps of one optimizer step, and what all ranks saw of it.

Every rank runs A micro-steps of one pack each. With ``S`` a micro-step's loss sums and ``N`` the step's denominators
from the plan, its loss is ``A W (S_velocity / N_velocity + weight S_insertion / N_insertion)``: ``engine.backward``
divides by A and DeepSpeed averages over the W ranks (DESIGN.md section 4). A micro-step without a pack is all padding:
its sums are zero, and so are their gradients. Whether the optimizer then steps is for the ranks to agree on
(``training.guard``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flowception.data.loader import StepBatch
from flowception.data.step_plan import StepPlan
from flowception.data.transfer import packs_on_device
from flowception.flow.loss import insertion_loss_sum, velocity_loss_sum
from flowception.training.diagnostics import observe, observed_metrics
from flowception.training.distributed.collectives import Ranks, gather_rows
from flowception.training.distributed.zero import backward
from flowception.training.hardware import peak_memory_gib


class MicroSteps(NamedTuple):
    """What one rank saw."""

    velocity_sum: float
    """Weighted loss sums of this rank's packs."""
    insertion_sum: float
    observed: list[float]
    """Sums that ``observe`` describes, over this rank's packs."""
    not_finite: list[int]
    """Micro-steps whose own loss sums are not finite."""


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """What all ranks saw of a step; the same on each."""

    loss: float
    """The step's: ``velocity_loss`` and the weighted ``insertion_loss``."""
    velocity_loss: float
    insertion_loss: float
    loss_by_rank: list[float]
    """What each rank brings to ``loss``."""
    loss_sums: list[float]
    """Loss sums of all ranks; a loss that is not finite is seen here, whatever its weight."""
    clips: int
    """Clips that could be read."""
    tokens: int
    """Their visible tokens."""
    stop: bool
    """Whether a signal asked any rank to stop."""
    data_wait_s: float
    """Of the rank that waited longest."""
    peak_memory_gib: float
    """Of the rank that needed most."""
    observed: list[float]
    """Sums that ``observe`` describes, over the packs of all ranks."""


def run_micro_steps(
    engine: Any,
    batch: StepBatch,
    ranks: Ranks,
    insertion_loss_weight: float,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> MicroSteps:
    """Run a rank's forward and backward passes; the gradients wait for the optimizer. Collective.

    Args:
        engine: From ``build_engine``.
        batch: This rank's packs.
        ranks: This rank.
        insertion_loss_weight: Weight of the insertion loss.
        phase: Opened around each part by its name, ``forward`` and ``backward``.

    Returns:
        Loss sums and what was observed.
    """
    plan, micro_steps, rows = batch.step_plan, len(batch.packs), list[torch.Tensor]()
    for number, pack in enumerate(packs_on_device(batch.packs, ranks.device)):
        with phase("forward"):
            output = engine(pack)
            velocity = velocity_loss_sum(output.velocity, pack.velocity_target, pack.velocity_mask, pack.weight_token)
            insertion = insertion_loss_sum(output.log_rate, pack.missing, pack.insertion_mask, pack.weight_frame)
            loss = velocity / plan.velocity_denominator + insertion_loss_weight * insertion / plan.insertion_denominator
        with phase("backward"):
            backward(engine, loss * (micro_steps * ranks.world_size))
            rows.append(torch.cat([torch.stack([velocity, insertion]).detach().double(), observe(output, pack)]))
            if number + 1 < micro_steps:
                engine.step()
    with phase("backward"):  # here the host waits for its GPU, which may be in the middle of the passes
        by_micro_step = torch.stack(rows).tolist()
    velocity_sum, insertion_sum, *observed = (sum(column) for column in zip(*by_micro_step, strict=True))
    not_finite = [number for number, row in enumerate(by_micro_step) if not all(map(math.isfinite, row[:2]))]
    return MicroSteps(velocity_sum, insertion_sum, observed, not_finite)


def summarize(
    own: MicroSteps, batch: StepBatch, ranks: Ranks, insertion_loss_weight: float, *, data_wait_s: float, stop: bool
) -> StepSummary:
    """Tell all ranks what this one saw of a step, and learn what they saw. Collective.

    Args:
        own: From ``run_micro_steps``.
        batch: This rank's packs.
        ranks: This rank.
        insertion_loss_weight: Weight of the insertion loss.
        data_wait_s: How long this rank waited for its packs.
        stop: Whether a signal asked this rank to stop.

    Returns:
        The step.
    """
    plan, bad = batch.step_plan, batch.quarantined
    bad_tokens, memory_gib = sum(clip.tokens for clip in bad), peak_memory_gib(ranks.device)
    row = [own.velocity_sum, own.insertion_sum, data_wait_s, stop, len(bad), bad_tokens, memory_gib, *own.observed]
    by_rank = zip(*gather_rows(row, ranks), strict=True)
    velocity_sums, insertion_sums, waits_s, stops, bad_counts, bad_token_counts, memories_gib, *observed = by_rank
    velocity_loss = sum(velocity_sums) / plan.velocity_denominator
    insertion_loss = sum(insertion_sums) / plan.insertion_denominator
    return StepSummary(
        loss=velocity_loss + insertion_loss_weight * insertion_loss,
        velocity_loss=velocity_loss,
        insertion_loss=insertion_loss,
        loss_by_rank=[
            velocity / plan.velocity_denominator + insertion_loss_weight * insertion / plan.insertion_denominator
            for velocity, insertion in zip(velocity_sums, insertion_sums, strict=True)
        ],
        loss_sums=[*velocity_sums, *insertion_sums],
        clips=plan.clips - int(sum(bad_counts)),
        tokens=plan.tokens - int(sum(bad_token_counts)),
        stop=any(stops),
        data_wait_s=max(waits_s),
        peak_memory_gib=max(memories_gib),
        observed=[sum(column) for column in observed],
    )


def step_metrics(
    step: StepSummary,
    plan: StepPlan,
    *,
    lr: float,
    grad_norm: float,
    skipped_steps: int,
    expected_attention_ratio: float,
) -> dict[str, Any]:
    """A step's line of ``metrics.jsonl``, but for its number and times.

    Args:
        step: What all ranks saw.
        plan: What was planned.
        lr: Learning rate.
        grad_norm: Global gradient norm before clipping.
        skipped_steps: Steps of the run that were refused so far.
        expected_attention_ratio: Of the whole set.

    Returns:
        Metrics by name, the same on all ranks.
    """
    return {
        "loss": step.loss,
        "loss/velocity": step.velocity_loss,
        "loss/insertion": step.insertion_loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "skipped_steps": skipped_steps,
        "bad_clips": plan.clips - step.clips,
        "clips": step.clips,
        "tokens": step.tokens,
        "fill": plan.fill,
        "flops_imbalance": plan.flops_imbalance,
        "flops": plan.flops,
        "attention_ratio": plan.attention_ratio,
        "attention_ratio_expected": expected_attention_ratio,
        "data_wait_s": step.data_wait_s,
        "peak_memory_gib": step.peak_memory_gib,
        **observed_metrics(step.observed),
    }
