"""How long an optimizer step would take, from sizes and assumed speeds: an estimate for planning, not a measurement.

Computing goes at a share of the GPU's peak, the blocks' recomputation included. Of what a rank sends, rings over nodes
of G GPUs put a G-th part on each GPU's share of the network between nodes; what stays inside a node is not counted.
Communication may run beside the computing or not: a step takes as long as the longer of the two, or as both.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowception.nn.flops import TRAINING_PASSES
from flowception.training.traffic import TrafficPerStep

DAY_S = 86400.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute_s: float
    communication_s: float
    """Between nodes."""

    @property
    def overlapped_s(self) -> float:
        """If all communication runs beside the computing."""
        return max(self.compute_s, self.communication_s)

    @property
    def in_turn_s(self) -> float:
        """If none does."""
        return self.compute_s + self.communication_s


def compute_s(flops: float, tflops: float, recomputed_share: float) -> float:
    """Seconds that one rank computes.

    Args:
        flops: Its forward and backward passes, without recomputation.
        tflops: What it multiplies in a second, 1e12.
        recomputed_share: Share of the blocks that are computed again in the backward pass, 0 to 1.

    Returns:
        Seconds.
    """
    return flops * (1 + recomputed_share / TRAINING_PASSES) / (tflops * 1e12)


def bytes_between_nodes(
    traffic: TrafficPerStep, *, world_size: int, gpus_per_node: int, group_size: int | None
) -> float:
    """What one GPU's share of the network between nodes carries in a step.

    Args:
        traffic: What a rank sends.
        world_size: W.
        gpus_per_node: G.
        group_size: Ranks of a group (hpZ); None for off. A group larger than a node crosses nodes too.

    Returns:
        Bytes; 0 on one node.
    """
    if world_size <= gpus_per_node:
        return 0.0
    crossing = traffic.gathered + traffic.reduced
    if group_size is not None and group_size > gpus_per_node:
        crossing += traffic.gathered_in_group
    return crossing / gpus_per_node
