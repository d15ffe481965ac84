"""Types of the plan: the configured sizes, cursors, packs, and steps.

Shape legend: ``k`` clips of a pack, ``G`` packs of a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowception.errors import ConfigError
from flowception.ranges import check_ranges, integer, number


@dataclass(kw_only=True)
class PlanConfig:
    """The sizes of steps and packs."""

    token_budget: int
    """Tokens of a pack: latent, insertion, text, and padding."""
    packs_per_step: int
    """Packs of an optimizer step, over all ranks. At least the number of ranks; a multiple of it wastes nothing."""
    headroom: float = 0.01
    """A step stops taking clips once at most this fraction of its tokens is free. A step offered far more clips than
    fit would carry many over."""
    shuffle_block_shards: int = 16
    """Clips are shuffled inside blocks of this many shards. More shards mix better, but reads are more scattered."""
    time_block_clips: int = 32
    """Global times are stratified over blocks of this many clips; 1 draws them independently."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules = {
            "token_budget": integer(at_least=1),
            "packs_per_step": integer(at_least=1),
            "shuffle_block_shards": integer(at_least=1),
            "time_block_clips": integer(at_least=1),
            "headroom": number(at_least=0, below=1),
        }
        check_ranges("", self, rules)

    @property
    def capacity(self) -> int:
        """Tokens of a step, ``packs_per_step * token_budget``."""
        return self.packs_per_step * self.token_budget

    @property
    def limit(self) -> int:
        """Tokens offered to a step, not counting the last clip."""
        return int((1.0 - self.headroom) * self.capacity)


def check_world_size(packs_per_step: int, world_size: int) -> None:
    """Raise ``ConfigError`` if there are more ranks than packs per step, as some ranks would never see data."""
    if packs_per_step < world_size:
        raise ConfigError(
            f"packs_per_step must be at least the number of ranks, got {packs_per_step} and {world_size} ranks; set "
            f"packs_per_step={world_size} or more, or use fewer ranks"
        )


@dataclass(frozen=True, order=True)
class Cursor:
    """A step's position in a run, which is all that resuming needs."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, eq=False)
class PackPlan:
    """One pack before reading."""

    epoch: int
    number: int
    """Index in the step, 0 to G - 1; packs with more FLOPs come first."""
    rows: NDArray[np.int64]
    """[k] rows of its clips in the index."""
    places: NDArray[np.int64]
    """[k] places of its clips in the epoch's order."""
    u_time: NDArray[np.float64] | None = None
    """[k] uniforms for global times, if prescribed (validation); None for the plan's own."""


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One optimizer step."""

    epoch: int
    step: int
    packs: list[PackPlan]
    velocity_denominator: float
    insertion_denominator: float
    clips: int
    tokens: int
    """Tokens of all packs, without padding."""
    fill: float
    """``tokens`` over the step's capacity."""
    flops_imbalance: float
    """FLOPs of the fullest pack over the mean, minus 1."""
    flops: float
    """FLOPs of forward and backward over all packs, without padding and recomputation."""
    attention_ratio: float
    """Attention pairs between tokens of visible frames, divided by those of full clips."""


def combine_digests(digests: Sequence[str]) -> str:
    """The hash of a step from the digests of its packs, in pack order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
