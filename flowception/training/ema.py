"""Exponential moving average (EMA) of the weights, in float32, sharded like the master weights.

``ema <- decay * ema + (1 - decay) * weight`` after every optimizer step. Early in a run the decay is smaller,
``min(decay, (1 + n) / (warmup + n))`` at the n-th update, so that the average forgets the random initialization.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowception.ranges import check_ranges, integer, number


@dataclass(kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights."""

    decay: float = 0.9999
    """Decay per step."""
    warmup_updates: int = 10
    """The decay of the n-th update is at most (1 + n) / (warmup_updates + n). 1 is off."""

    def __post_init__(self) -> None:
        rules = {"decay": number(at_least=0, below=1), "warmup_updates": integer(at_least=1, note="1 is off")}
        check_ranges("ema", self, rules)


def decay_at(config: EmaConfig, step: int) -> float:
    """Decay of the update after optimizer step ``step`` (counted from 0)."""
    return min(config.decay, (1 + step) / (config.warmup_updates + step))
