"""The micro-steps of one optimizer step on one rank.

Every rank runs A micro-steps of one pack each. With ``S`` a micro-step's loss sums and ``N`` the step's denominators
from the plan, its loss is ``A W (S_velocity / N_velocity + weight S_insertion / N_insertion)``: ``engine.backward``
divides by A and DeepSpeed averages over the W ranks (DESIGN.md section 4). A micro-step without a pack is all padding:
its sums are zero, and so are their gradients. Whether the optimizer then steps is for the ranks to agree on
(``training.guard``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flowception.data.loader import StepBatch
from flowception.data.transfer import packs_on_device
from flowception.flow.loss import insertion_loss_sum, velocity_loss_sum
from flowception.training.diagnostics import observe
from flowception.training.distributed.collectives import Ranks
from flowception.training.distributed.zero import backward


class MicroSteps(NamedTuple):
    """What one rank saw."""

    velocity_sum: float
    """Weighted loss sums of this rank's packs."""
    insertion_sum: float
    observed: list[float]
    """Sums that ``observe`` describes, over this rank's packs."""
    not_finite: list[int]
    """Micro-steps whose own loss sums are not finite."""


def run_micro_steps(
    engine: Any, batch: StepBatch, ranks: Ranks, insertion_loss_weight: float, enter: Callable[[str], None]
) -> MicroSteps:
    """Run a rank's forward and backward passes; the gradients wait for the optimizer. Collective.

    Args:
        engine: From ``build_engine``.
        batch: This rank's packs.
        ranks: This rank.
        insertion_loss_weight: Weight of the insertion loss.
        enter: Told of every phase as it begins, ``forward`` and ``backward``.

    Returns:
        Loss sums and what was observed.
    """
    plan, micro_steps, rows = batch.step_plan, len(batch.packs), list[torch.Tensor]()
    for number, pack in enumerate(packs_on_device(batch.packs, ranks.device)):
        enter("forward")
        output = engine(pack)
        velocity = velocity_loss_sum(output.velocity, pack.velocity_target, pack.velocity_mask, pack.weight_token)
        insertion = insertion_loss_sum(output.log_rate, pack.missing, pack.insertion_mask, pack.weight_frame)
        loss = velocity / plan.velocity_denominator + insertion_loss_weight * insertion / plan.insertion_denominator
        enter("backward")
        backward(engine, loss * (micro_steps * ranks.world_size))
        rows.append(torch.cat([torch.stack([velocity, insertion]).detach().double(), observe(output, pack)]))
        if number + 1 < micro_steps:
            engine.step()
    by_micro_step = torch.stack(rows).tolist()
    velocity_sum, insertion_sum, *observed = (sum(column) for column in zip(*by_micro_step, strict=True))
    not_finite = [number for number, row in enumerate(by_micro_step) if not all(map(math.isfinite, row[:2]))]
    return MicroSteps(velocity_sum, insertion_sum, observed, not_finite)
