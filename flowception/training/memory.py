"""Memory that one rank needs, by part, from sizes alone.

Counted for how ``training.zero`` keeps the state: float32 weights, gradients, two moments and EMA, sharded by the ZeRO
stage. Activations are an estimate from what the blocks keep for their backward pass.

Shape legend: ``P`` parameters, ``W`` ranks, ``T`` tokens of a pack, ``d`` hidden size, ``L`` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowception.nn.flops import FlopSpec

FP32_BYTES, BF16_BYTES = 4, 2
KEPT_BYTES = {"bf16": 78, "autocast": 90, "fp32": 124}
"""Bytes that a block keeps for its backward pass, per token and unit of hidden size, by type of its arithmetic.
Measured on the CPU by tests/training/test_memory.py."""


@dataclass(frozen=True)
class MemoryPerRank:
    """Bytes, by part."""

    weights: float
    """Weights and masters that live between steps."""
    working_weights: float
    """Stage 3: weights gathered for the blocks at work, or kept because they are needed again soon; stages 0 and 1 in
    bf16: autocast's copies."""
    gradients: float
    optimizer: float
    ema: float
    activations: float
    """Estimate."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def memory_per_rank(
    *,
    parameters: int,
    world_size: int,
    stage: int,
    spec: FlopSpec,
    token_budget: int,
    precision: str,
    activation_checkpointing: bool,
    bucket_elements: int,
    max_live_elements: int,
) -> MemoryPerRank:
    """Estimate a rank's memory.

    Args:
        parameters: P.
        world_size: W.
        stage: ZeRO stage.
        spec: Sizes of the network.
        token_budget: T.
        precision: ``bf16`` or ``fp32``.
        activation_checkpointing: Whether blocks are computed again in the backward pass.
        bucket_elements: Elements of a communication bucket.
        max_live_elements: Stage 3: gathered weights that may be live at once.

    Returns:
        Bytes by part.
    """
    whole, share = FP32_BYTES * parameters, FP32_BYTES * parameters / world_size
    bucket = FP32_BYTES * min(bucket_elements, parameters)
    arithmetic = "fp32" if precision == "fp32" else "bf16" if stage >= 2 else "autocast"
    element_bytes = BF16_BYTES if arithmetic == "bf16" else FP32_BYTES
    copies = element_bytes * parameters if arithmetic == "bf16" else 0
    at_work = element_bytes * min(
        max(max_live_elements, 2 * parameters / spec.num_layers + bucket_elements), parameters
    )
    kept = token_budget * spec.hidden_size * KEPT_BYTES[arithmetic]
    between_blocks = token_budget * spec.hidden_size * element_bytes * spec.num_layers
    return MemoryPerRank(
        weights={0: whole, 1: whole + share, 2: (copies or whole) + share, 3: copies / world_size + share}[stage],
        working_weights=at_work if stage == 3 else BF16_BYTES * parameters * (arithmetic == "autocast"),
        gradients=whole + bucket if stage < 2 else share + 2 * bucket,
        optimizer=2 * (whole if stage == 0 else share),
        ema=whole if stage == 0 else share,
        activations=kept + between_blocks if activation_checkpointing else kept * spec.num_layers,
    )
