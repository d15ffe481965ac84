"""How long an optimizer step would take, from sizes and assumed speeds: an estimate for planning, not a measurement.

Computing goes at a share of the GPU's peak, the blocks' recomputation included. What a rank sends goes along rings:
with nodes of G GPUs a G-th part of it crosses between nodes, on each GPU's share of that network, and the rest stays
inside a node; both kinds of link work at once, and a ring is as slow as the slower. Communication may run beside the
computing or not: a step takes as long as the longer of the two, or as both. What the host needs to gather weights at
stage 3 is counted by the block, and the optimizer by the bytes that it reads and writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowception.packing.flops import TRAINING_PASSES
from flowception.training.estimate.communication import TrafficPerStep

DAY_S = 86400.0
UPDATE_BYTES = 48
"""Read and written for each parameter that a rank updates, all float32: the gradient's clipping 8, AdamW 16 and 12, the
EMA 8 and 4."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is assumed of the machines."""

    peak_tflops: float
    """TFLOP/s of a rank at most."""
    hfu: float
    """Share of the peak at which it computes, recomputation included (hardware FLOPs utilization)."""
    gpus_per_node: int
    """G."""
    between_nodes_gb_per_s: float
    """What a GPU's share of the network between nodes carries each way."""
    inside_node_gb_per_s: float
    """What a GPU sends to the others of its node."""
    stage_3_block_ms: float
    """Stage 3: how long a block's forward and backward pass of a micro-step waits for the host to gather weights."""
    memory_gb_per_s: float
    """What a device reads and writes of its own memory."""

    @property
    def tflops(self) -> float:
        """What a rank computes in a second, 1e12."""
        return self.hfu * self.peak_tflops


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute_s: float
    communication_s: float
    host_s: float = 0.0
    """Stage 3: waiting for the host."""
    update_s: float = 0.0
    """Clipping, AdamW and EMA."""

    @property
    def overlapped_s(self) -> float:
        """If all communication runs beside the computing."""
        return max(self.compute_s + self.host_s, self.communication_s) + self.update_s

    @property
    def sequential_s(self) -> float:
        """If none does."""
        return self.compute_s + self.host_s + self.communication_s + self.update_s


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


def communication_s(traffic: TrafficPerStep, cluster: Cluster, *, world_size: int, group_size: int | None) -> float:
    """Seconds that a step's communication takes, one collective after the other.

    Args:
        traffic: What a rank sends.
        cluster: The machines.
        world_size: W.
        group_size: Ranks of a group (hpZ); None for off.

    Returns:
        Seconds.
    """
    return _ring_s(traffic.gathered + traffic.reduced, world_size, cluster) + _ring_s(
        traffic.gathered_in_group, group_size or 1, cluster
    )


def _ring_s(sent: float, ranks: int, cluster: Cluster) -> float:
    inside_s = sent / (cluster.inside_node_gb_per_s * 1e9)
    per_node = cluster.gpus_per_node
    if ranks <= per_node:
        return inside_s
    return max(inside_s * (per_node - 1) / per_node, sent / per_node / (cluster.between_nodes_gb_per_s * 1e9))
