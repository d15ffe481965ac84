"""Bytes that one rank sends per optimizer step, computed from sizes, for DeepSpeed's collectives as ``zero`` sets them.

In a ring of W ranks, each rank sends ``(W - 1) / W`` of the full tensor for an all-gather or a reduce-scatter, twice
that for an all-reduce, and receives as much. Gradients are sent in float32, weights in the type they are stored in.
With A micro-steps and P parameters:

* stages 0 and 1 reduce the gradients once per step, stages 2 and 3 in every micro-step. Stages 0 to 2 use all-reduce
  (DeepSpeed's default ``use_multi_rank_bucket_allreduce``), stage 3 reduce-scatter;
* stages 1 and 2 gather the updated weights once;
* stage 3 gathers them for every forward and backward pass, ``2 A`` times. Weights that stay live in between
  (``zero.max_live_elements``) would reduce this; the estimate assumes that none do. With groups (hpZ) the first gather
  is over all ranks, and the others are within the group.

``tests/training/estimate/test_memory.py`` counts the same bytes in real runs of two processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowception.training.estimate.memory import FP32_BYTES, kept_weight_bytes


@dataclass(frozen=True)
class TrafficPerStep:
    """Bytes that one rank sends per optimizer step."""

    gathered: float
    """Weights, all-gather over all ranks."""
    gathered_in_group: float
    """Weights, all-gather within a group of ``zero.hierarchical_partition_size`` ranks."""
    reduced: float
    """Gradients, over all ranks."""


def traffic_per_step(
    *, parameters: int, world_size: int, stage: int, precision: str, micro_steps: int, group_size: int | None
) -> TrafficPerStep:
    """Count the bytes that a rank sends.

    Args:
        parameters: P.
        world_size: W.
        stage: ZeRO stage.
        precision: ``bf16`` or ``fp32``.
        micro_steps: A.
        group_size: Ranks of a group (hpZ); None for off.

    Returns:
        Bytes by kind.
    """
    share = (world_size - 1) / world_size
    gradients, weights = FP32_BYTES * parameters * share, kept_weight_bytes(stage, precision) * parameters
    passes = 2 * micro_steps
    if stage < 3:
        reductions = micro_steps if stage == 2 else 1
        return TrafficPerStep(weights * share if stage else 0.0, 0.0, 2 * gradients * reductions)
    if group_size is None:
        return TrafficPerStep(passes * weights * share, 0.0, gradients * micro_steps)
    in_group = (passes - 1) * weights * (group_size - 1) / group_size
    return TrafficPerStep(weights * share, in_group, gradients * micro_steps)
