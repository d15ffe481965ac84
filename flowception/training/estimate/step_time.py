"""Estimated time of an optimizer step, from sizes and assumed speeds. It is for planning, and is not a measurement.

Compute runs at a share of the GPU's peak, with recomputation counted. Communication uses rings: with nodes of G GPUs,
1/G of what a rank sends crosses between nodes, over each GPU's share of that network, and the rest stays inside a node.
Both kinds of link work at the same time, and the slower one limits the ring. A step takes the maximum of compute and
communication if they overlap, and their sum if they do not. The host's time to gather weights at stage 3 is counted per
block, and the optimizer by the bytes that it reads and writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowception.packing.flops import TRAINING_PASSES
from flowception.training.estimate.communication import TrafficPerStep

DAY_S = 86400.0
UPDATE_BYTES = 48
"""Bytes read and written for each parameter that a rank updates, all float32: gradient clipping 8, AdamW 16 and 12, EMA
8 and 4."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Assumed speeds of the machines."""

    peak_tflops: float
    """Peak TFLOP/s of a rank."""
    hfu: float
    """Achieved share of the peak, with recomputation counted (hardware FLOPs utilization)."""
    gpus_per_node: int
    """G."""
    between_nodes_gb_per_s: float
    """GB/s each way over one GPU's share of the network between nodes."""
    inside_node_gb_per_s: float
    """GB/s that a GPU sends to the other GPUs of its node."""
    stage_3_block_ms: float
    """Stage 3: wait for the host to gather weights, per block and micro-step (forward and backward)."""
    memory_gb_per_s: float
    """Memory bandwidth of a device."""

    @property
    def tflops(self) -> float:
        """Achieved TFLOP/s of a rank."""
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
        """Step time if all communication overlaps with compute."""
        return max(self.compute_s + self.host_s, self.communication_s) + self.update_s

    @property
    def sequential_s(self) -> float:
        """Step time if none does."""
        return self.compute_s + self.host_s + self.communication_s + self.update_s


def compute_s(flops: float, tflops: float, recomputed_share: float) -> float:
    """Compute time of one rank.

    Args:
        flops: FLOPs of its forward and backward passes, without recomputation.
        tflops: Achieved TFLOP/s.
        recomputed_share: Share of the blocks that the backward pass recomputes, 0 to 1.

    Returns:
        Seconds.
    """
    return flops * (1 + recomputed_share / TRAINING_PASSES) / (tflops * 1e12)


def bytes_between_nodes(
    traffic: TrafficPerStep, *, world_size: int, gpus_per_node: int, group_size: int | None
) -> float:
    """Bytes per step over one GPU's share of the network between nodes.

    Args:
        traffic: Bytes that a rank sends.
        world_size: W.
        gpus_per_node: G.
        group_size: Ranks of a group (hpZ); None is off. A group larger than a node crosses nodes too.

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
    """Communication time of a step, with collectives in sequence.

    Args:
        traffic: Bytes that a rank sends.
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
