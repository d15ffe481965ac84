"""The micro-steps of one optimizer step, and their summary over all ranks.

Every rank runs A micro-steps of one pack each. With ``S`` the loss sums of a micro-step and ``N`` the denominators of
the step from the plan, the loss of the micro-step is ``A W (S_velocity / N_velocity + weight S_insertion /
N_insertion)``, because ``engine.backward`` divides by A and DeepSpeed averages over the W ranks.
A micro-step without a pack is all padding, so its sums and their gradients are zero. The ranks then decide together
whether to apply the optimizer step (``training.guard``).
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
    """Result of the micro-steps of one rank."""

    velocity_sum: float
    """Weighted loss sums of this rank's packs."""
    insertion_sum: float
    observed: list[float]
    """Sums from ``observe``, over this rank's packs."""
    not_finite: list[int]
    """Micro-steps whose loss sums are not finite."""


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """Summary of a step over all ranks; the same on each rank."""

    loss: float
    """Loss of the step: ``velocity_loss`` plus the weighted ``insertion_loss``."""
    velocity_loss: float
    insertion_loss: float
    loss_by_rank: list[float]
    """Contribution of each rank to ``loss``."""
    loss_sums: list[float]
    """Loss sums of all ranks; they show a loss that is not finite even if its weight is 0."""
    clips: int
    """Readable clips."""
    tokens: int
    """Their visible tokens."""
    stop: bool
    """Whether any rank received a signal to stop."""
    data_wait_s: float
    """Longest wait of any rank."""
    peak_memory_gib: float
    """Highest peak memory of any rank."""
    observed: list[float]
    """Sums from ``observe``, over the packs of all ranks."""


def run_micro_steps(
    engine: Any,
    batch: StepBatch,
    ranks: Ranks,
    insertion_loss_weight: float,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> MicroSteps:
    """Run this rank's forward and backward passes, and accumulate gradients for the optimizer step. Collective.

    Args:
        engine: From ``build_engine``.
        batch: This rank's packs.
        ranks: This rank.
        insertion_loss_weight: Weight of the insertion loss.
        phase: Context manager entered around each part with its name, ``forward`` or ``backward``.

    Returns:
        Loss sums and diagnostics.
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
    with phase("backward"):  # the host waits here for its GPU, which may still be running the passes
        by_micro_step = torch.stack(rows).tolist()
    velocity_sum, insertion_sum, *observed = (sum(column) for column in zip(*by_micro_step, strict=True))
    not_finite = [number for number, row in enumerate(by_micro_step) if not all(map(math.isfinite, row[:2]))]
    return MicroSteps(velocity_sum, insertion_sum, observed, not_finite)


def summarize_step(
    own: MicroSteps, batch: StepBatch, ranks: Ranks, insertion_loss_weight: float, *, data_wait_s: float, stop: bool
) -> StepSummary:
    """Combine the results of a step over all ranks. Collective.

    Args:
        own: From ``run_micro_steps``.
        batch: This rank's packs.
        ranks: This rank.
        insertion_loss_weight: Weight of the insertion loss.
        data_wait_s: How long this rank waited for its packs.
        stop: Whether this rank received a signal to stop.

    Returns:
        The summary of the step.
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
    """Metrics of a step for ``metrics.jsonl``, except its number and times.

    Args:
        step: Summary over all ranks.
        plan: Plan of the step.
        lr: Learning rate.
        grad_norm: Global gradient norm before clipping.
        skipped_steps: Skipped steps of the run so far.
        expected_attention_ratio: Expected ratio over the complete data set.

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
