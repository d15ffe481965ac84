"""Clips sampled while a run trains, made by all ranks together.

Under ZeRO-3 an evaluation gathers weights and is collective, so every rank evaluates the network equally often. What
samples is in another layer (``generation.training_sampler``) and is handed in by ``train/main.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from flowception.ranges import check_ranges, integer, number
from flowception.training.distributed.collectives import Ranks, gather_values


@dataclass(kw_only=True)
class SamplesConfig:
    """Clips sampled from the EMA weights while the run trains, into ``samples/`` of the run directory."""

    every_steps: int | None = None
    """Steps between samples; None is off."""
    num_clips: int = 8
    """Clips each time, spread over the ranks. Clip i has seed i and the task, context, class and text of the same
    held-out clip each time."""
    num_inference_steps: int = 50
    """Evaluations that a frame takes from noise to data; a clip takes up to twice as many."""
    max_frames: int = 64
    """Cap on latent frames of a clip."""
    guidance: float | None = None
    """Classifier-free guidance on the velocity; None is off."""

    def __post_init__(self) -> None:
        rules = {
            "every_steps": integer(at_least=1).or_null("off"),
            "num_clips": integer(at_least=1),
            "num_inference_steps": integer(at_least=1),
            "max_frames": integer(at_least=1),
            "guidance": number().or_null("off"),
        }
        check_ranges("samples", self, rules)


class ClipSampler(Protocol):
    """Samples a run's clips."""

    def sample(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        """Sample and write this rank's clips, and describe them. Every rank calls the model equally often."""

    def join(self, step: int, records: list[dict[str, Any]]) -> Path | None:
        """List the clips of all ranks; the picture that shows them. One rank calls this."""


def take_samples(sampler: ClipSampler, engine: Any, step: int, ranks: Ranks) -> Path | None:
    """Sample from the engine's present weights. Collective.

    Args:
        sampler: What samples.
        engine: Put into evaluation mode and back.
        step: Steps done.
        ranks: This rank.

    Returns:
        On rank 0 the picture of all clips, if one could be drawn.
    """
    engine.eval()
    own = sampler.sample(engine, step)
    engine.train()
    records = [record for part in gather_values(own) for record in part]
    return sampler.join(step, records) if ranks.is_main else None
