"""Estimated memory of one rank by part, computed from sizes.

The state is as in ``training.distributed.zero``: float32 weights, gradients, two moments and EMA, sharded according to
the ZeRO stage. Activations are what autograd stores in the blocks for the backward pass.

Shape legend: ``P`` parameters, ``W`` ranks, ``T`` tokens of a pack, ``d`` hidden size, ``L`` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowception.packing.flops import ModelSpec

FP32_BYTES, BF16_BYTES = 4, 2
KEPT_BYTES = {
    "off": {"bf16": 77.6, "fp32": 122.9},
    "leaves": {"bf16": 40.4, "fp32": 80.6},
    "blocks": {"bf16": 40.5, "fp32": 76.6},
}
"""Bytes that a block stores for its backward pass, per token and unit of hidden size, by ``model.compile`` and
``precision``. In bf16 they are the same with bf16 weights and under autocast, whose weight copies are counted
separately. Measured on the CPU by tests/training/estimate/test_memory.py."""
INPUT_BYTES = {"bf16": BF16_BYTES, "fp32": FP32_BYTES}
"""The same for a checkpointed block, which stores only its input."""


@dataclass(frozen=True)
class MemoryPerRank:
    """Bytes, by part."""

    weights: float
    """Weights and masters that persist between steps, including a group's second copy (hpZ)."""
    working_weights: float
    """Stage 3: weights gathered for the current blocks or held for reuse. Stages 0 and 1 in bf16: autocast's copies."""
    gradients: float
    """Gradients that accumulate over the backward passes of a step."""
    buckets: float
    """Communication buckets: two if reduction overlaps with the backward pass."""
    optimizer: float
    ema: float
    activations: float
    """Estimate."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(vars(self).values())


def kept_weight_bytes(stage: int, precision: str) -> int:
    """Bytes per element of the weights that the network computes with, as stored and gathered."""
    return BF16_BYTES if precision == "bf16" and stage >= 2 else FP32_BYTES


def checkpoint_bytes(parameters: int) -> int:
    """Size of one checkpoint: weight, two moments and EMA in float32."""
    return 4 * FP32_BYTES * parameters


def block_activations(spec: ModelSpec, token_budget: int, precision: str, compiled: str) -> tuple[float, float]:
    """Bytes that a block stores for its backward pass, and that a checkpointed block stores.

    Args:
        spec: Architecture of the network.
        token_budget: T.
        precision: ``bf16`` or ``fp32``.
        compiled: ``model.compile``.
    """
    elements = token_budget * spec.hidden_size
    return elements * KEPT_BYTES[compiled][precision], elements * INPUT_BYTES[precision]


def memory_per_rank(
    *,
    parameters: int,
    world_size: int,
    stage: int,
    spec: ModelSpec,
    token_budget: int,
    precision: str,
    compiled: str,
    checkpointed_blocks: int,
    bucket_elements: int,
    max_live_elements: int,
    group_size: int | None = None,
) -> MemoryPerRank:
    """Estimate a rank's memory.

    Args:
        parameters: P.
        world_size: W.
        stage: ZeRO stage.
        spec: Architecture of the network.
        token_budget: T.
        precision: ``bf16`` or ``fp32``.
        compiled: ``model.compile``.
        checkpointed_blocks: Number of blocks, from the first, that the backward pass recomputes.
        bucket_elements: Elements of a communication bucket.
        max_live_elements: Stage 3: maximum elements of gathered weights held at once.
        group_size: Stage 3: ranks of a group with a second copy of the weights (hpZ); None is off.

    Returns:
        Bytes by part.
    """
    full, share = FP32_BYTES * parameters, FP32_BYTES * parameters / world_size
    element_bytes = kept_weight_bytes(stage, precision)
    kept_weights = element_bytes * parameters
    second_copy = kept_weights / group_size if group_size else 0.0
    at_work = element_bytes * min(
        max(max_live_elements, 2 * parameters / spec.num_layers + bucket_elements), parameters
    )
    kept, block_input = block_activations(spec, token_budget, precision, compiled)
    kept_blocks = max(spec.num_layers - checkpointed_blocks, 1)  # if none is kept, the block being recomputed
    return MemoryPerRank(
        weights={
            0: full,
            1: full + share,
            2: kept_weights + share,
            3: kept_weights / world_size + share + second_copy,
        }[stage],
        working_weights=at_work if stage == 3 else BF16_BYTES * parameters * (precision == "bf16" and stage < 2),
        gradients=full if stage < 2 else share,
        buckets=(1 if stage < 2 else 2) * FP32_BYTES * min(bucket_elements, parameters),
        optimizer=2 * (full if stage == 0 else share),
        ema=full if stage == 0 else share,
        activations=kept * kept_blocks + block_input * (spec.num_layers - kept_blocks),
    )
