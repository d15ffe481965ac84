"""The dry run's ranking: which sharding, with how many recomputed blocks, would be the fastest.

An arrangement is a ZeRO stage (stage 3 also in groups, hpZ) and a number of blocks that the backward pass recomputes.
For each stage, the fewest recomputed blocks that fit a device's memory are the fastest, so there is one candidate per
stage. Candidates are ranked by the estimated step time without overlap of communication and compute (``step_time``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flowception.nn.presets import AUTO
from flowception.packing.flops import ModelSpec
from flowception.training.config import TrainConfig
from flowception.training.distributed.zero import ZeroConfig
from flowception.training.estimate.communication import TrafficPerStep, traffic_per_step
from flowception.training.estimate.memory import MemoryPerRank, memory_per_rank
from flowception.training.estimate.step_time import (
    UPDATE_BYTES,
    Cluster,
    StepTime,
    bytes_between_nodes,
    communication_s,
    compute_s,
)
from flowception.training.hardware import GIB

USABLE_SHARE = 0.9
"""Share of a device's memory that the estimate may fill. The estimate does not include the CUDA context and the buffers
of the communication library (2 to 3 GB together), cuBLAS and attention workspaces, activation gradients of the current
block, the float32 activations of the output heads, the packs, and fragmentation of the allocator."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The properties of a run that all arrangements share."""

    parameters: int
    spec: ModelSpec
    token_budget: int
    precision: str
    compiled: str
    """``model.compile``."""
    packs_per_step: int
    step_flops: float = 0.0
    """Forward and backward FLOPs of a step's packs, without recomputation; 0 if time is not estimated."""

    @classmethod
    def of(cls, config: TrainConfig, parameters: int, step_flops: float = 0.0) -> Job:
        """The job of a configuration."""
        return cls(
            parameters=parameters,
            spec=config.model.spec(),
            token_budget=config.plan.token_budget,
            precision=config.precision,
            compiled=str(config.model.compile),
            packs_per_step=config.plan.packs_per_step,
            step_flops=step_flops,
        )

    def packs(self, world_size: int) -> int | None:
        """Micro-steps per rank; None if there are fewer packs than ranks."""
        return -(-self.packs_per_step // world_size) if self.packs_per_step >= world_size else None

    def memory(self, zero: ZeroConfig, world_size: int, checkpointed_blocks: int) -> MemoryPerRank:
        """Estimated memory of a rank."""
        return memory_per_rank(
            parameters=self.parameters,
            world_size=world_size,
            stage=zero.stage,
            spec=self.spec,
            token_budget=self.token_budget,
            precision=self.precision,
            compiled=self.compiled,
            checkpointed_blocks=checkpointed_blocks,
            bucket_elements=zero.bucket_elements,
            max_live_elements=zero.max_live_elements,
            group_size=zero.hierarchical_partition_size,
        )

    def fewest_checkpointed(self, zero: ZeroConfig, world_size: int, memory_bytes: float) -> int | None:
        """Fewest checkpointed blocks for which the estimate fits a device; None if it does not fit with all of them."""
        for blocks in range(self.spec.num_layers + 1):
            if self.memory(zero, world_size, blocks).total <= USABLE_SHARE * memory_bytes:
                return blocks
        return None


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """A sharding and a number of recomputed blocks, with their estimated cost."""

    zero: ZeroConfig
    checkpointed_blocks: int
    memory: MemoryPerRank
    traffic: TrafficPerStep
    between_nodes: float
    """Bytes per step over one GPU's share of the network between nodes."""
    time: StepTime

    def __str__(self) -> str:
        """Name of the sharding, such as 'ZeRO-3 in groups of 8'."""
        group = self.zero.hierarchical_partition_size
        return f"ZeRO-{self.zero.stage}" + (f" in groups of {group}" if group else "")

    def kept(self, num_layers: int) -> str:
        """How many blocks keep their activations and are not recomputed, in words."""
        kept = num_layers - self.checkpointed_blocks
        return f"all {kept} blocks kept" if kept == num_layers else f"{kept or 'none'} of {num_layers} blocks kept"


def arrange(job: Job, cluster: Cluster, zero: ZeroConfig, world_size: int, checkpointed_blocks: int) -> Arrangement:
    """Estimate one arrangement.

    Args:
        job: The run; it has at least one pack per rank.
        cluster: The machines.
        zero: The sharding.
        world_size: Number of ranks.
        checkpointed_blocks: Blocks that the backward pass recomputes.

    Returns:
        The arrangement.
    """
    packs, group = -(-job.packs_per_step // world_size), zero.hierarchical_partition_size
    traffic = traffic_per_step(
        parameters=job.parameters,
        world_size=world_size,
        stage=zero.stage,
        precision=job.precision,
        micro_steps=packs,
        group_size=group,
    )
    layers, updated = job.spec.num_layers, job.parameters / (world_size if zero.stage else 1)
    return Arrangement(
        zero=zero,
        checkpointed_blocks=checkpointed_blocks,
        memory=job.memory(zero, world_size, checkpointed_blocks),
        traffic=traffic,
        between_nodes=bytes_between_nodes(
            traffic, world_size=world_size, gpus_per_node=cluster.gpus_per_node, group_size=group
        ),
        time=StepTime(
            compute_s(packs * job.step_flops / job.packs_per_step, cluster.tflops, checkpointed_blocks / layers),
            communication_s(traffic, cluster, world_size=world_size, group_size=group),
            packs * layers * cluster.stage_3_block_ms / 1e3 if zero.stage == 3 else 0.0,
            UPDATE_BYTES * updated / (cluster.memory_gb_per_s * 1e9),
        ),
    )


def ways_to_shard(zero: ZeroConfig, world_size: int, gpus_per_node: int) -> Iterator[ZeroConfig]:
    """Yield every stage, and stage 3 in groups: the configured groups, or else the nodes if there are several."""
    for stage in range(4):
        yield replace(zero, stage=stage, hierarchical_partition_size=None)
    configured = zero.hierarchical_partition_size
    group = configured or gpus_per_node
    if configured or (1 < group < world_size and world_size % group == 0):
        yield replace(zero, stage=3, hierarchical_partition_size=group)


def rank_arrangements(
    job: Job, cluster: Cluster, zero: ZeroConfig, world_size: int, memory_bytes: float
) -> list[Arrangement]:
    """Rank every sharding that fits, fastest first; ties go to the one with less memory.

    Args:
        job: The run; it has at least one pack per rank.
        cluster: The machines.
        zero: The configured sharding, whose other settings apply to all.
        world_size: Number of ranks.
        memory_bytes: Memory of a device.

    Returns:
        One arrangement per sharding, with the fewest recomputed blocks that fit.
    """
    fitting = []
    for way in ways_to_shard(zero, world_size, cluster.gpus_per_node):
        blocks = job.fewest_checkpointed(way, world_size, memory_bytes)
        if blocks is not None:
            fitting.append(arrange(job, cluster, way, world_size, blocks))
    return sorted(fitting, key=lambda found: (found.time.sequential_s, found.memory.total))


def checkpointed_blocks(job: Job, config: TrainConfig, world_size: int, memory_bytes: float) -> int:
    """Resolve ``model.activation_checkpointing`` to a number of blocks; ``auto`` is all blocks if nothing fits."""
    if config.model.activation_checkpointing != AUTO:
        return config.model.checkpointed_blocks()
    blocks = job.fewest_checkpointed(config.zero, world_size, memory_bytes)
    return job.spec.num_layers if blocks is None else blocks


def devices(world_size: int, memory_gb: float) -> str:
    """Describe devices, such as '8 GPUs of 80 GB'."""
    return f"{world_size} GPU{'s' * (world_size > 1)} of {memory_gb:.4g} GB"


def answer(
    ranked: list[Arrangement], configured: Arrangement, num_layers: int, world_size: int, memory_gb: float
) -> str:
    """Summarize the ranking in a sentence that compares the configured arrangement with the fastest.

    Args:
        ranked: From ``rank_arrangements``.
        configured: The configured arrangement.
        num_layers: Blocks of the network.
        world_size: Number of ranks.
        memory_gb: Memory of a device, as sold.

    Returns:
        The sentence.
    """
    where = devices(world_size, memory_gb)
    as_configured = f"{configured}, {configured.kept(num_layers)}"
    needs = f"needs {configured.memory.total / GIB:.1f} GiB and does not fit"
    if not ranked:
        return (
            f"nothing fits {where}: as configured, {as_configured}, the run {needs}; "
            "see configs/overlays/low_memory.yaml"
        )
    best = ranked[0]
    fastest = (
        f"fastest on {where}: {best}, {best.kept(num_layers)} ({best.memory.total / GIB:.1f} GiB, "
        f"{best.time.sequential_s:.3g} s per step)"
    )
    if (best.zero, best.checkpointed_blocks) == (configured.zero, configured.checkpointed_blocks):
        return f"{fastest}, as configured"
    if configured.memory.total > USABLE_SHARE * memory_gb * GIB:
        return f"{fastest}; as configured, {as_configured}, the run {needs}"
    return f"{fastest}; as configured, {as_configured}: {configured.time.sequential_s:.3g} s"
