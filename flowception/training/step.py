"""One optimizer step on one rank.

Every rank runs A micro-steps of one pack each. With ``S`` a micro-step's loss sums and ``N`` the step's denominators
from the plan, its loss is ``A W (S_velocity / N_velocity + weight S_insertion / N_insertion)``: ``engine.backward``
divides by A and DeepSpeed averages over the W ranks (DESIGN.md section 4). A micro-step without a pack is all padding:
its sums are zero, and so are their gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from flowception.data.loader import StepBatch
from flowception.flow.loss import insertion_loss_sum, velocity_loss_sum
from flowception.training.distributed import Ranks
from flowception.training.observe import OBSERVED, observe
from flowception.training.zero import StepOutcome, optimizer_step


class StepResult(NamedTuple):
    """What one rank saw."""

    velocity_sum: float
    """Weighted loss sums of this rank's packs."""
    insertion_sum: float
    observed: list[float]
    """Sums that ``observe`` describes, over this rank's packs."""
    outcome: StepOutcome


def training_step(
    engine: Any, batch: StepBatch, ranks: Ranks, insertion_loss_weight: float, clip_grad_norm: float | None
) -> StepResult:
    """Run a rank's micro-steps and the optimizer. Collective.

    Args:
        engine: From ``build_engine``, its learning rate set.
        batch: This rank's packs.
        ranks: This rank.
        insertion_loss_weight: Weight of the insertion loss.
        clip_grad_norm: Largest gradient norm; None is off.

    Returns:
        Loss sums, what was observed, and the optimizer's outcome.
    """
    plan, micro_steps = batch.step_plan, len(batch.packs)
    sums = torch.zeros(2 + OBSERVED, dtype=torch.float64, device=ranks.device)
    for number, host_pack in enumerate(batch.packs):
        pack = host_pack.to(ranks.device, non_blocking=True)
        output = engine(pack)
        velocity = velocity_loss_sum(output.velocity, pack.velocity_target, pack.velocity_mask, pack.weight_token)
        insertion = insertion_loss_sum(output.log_rate, pack.missing, pack.insertion_mask, pack.weight_frame)
        loss = velocity / plan.velocity_denominator + insertion_loss_weight * insertion / plan.insertion_denominator
        engine.backward(loss * (micro_steps * ranks.world_size))
        sums += torch.cat([torch.stack([velocity, insertion]).detach(), observe(output, pack)])
        if number + 1 < micro_steps:
            engine.step()
    outcome = optimizer_step(engine, clip_grad_norm)
    velocity_sum, insertion_sum, *observed = sums.tolist()
    return StepResult(velocity_sum, insertion_sum, observed, outcome)
