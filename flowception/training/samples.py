"""Sample clips during training, on all ranks together.

Under ZeRO-3 a network evaluation gathers weights and is collective, so every rank runs the same number of evaluations.
The sampler itself is in another layer (``generation.training_sampler``); ``train/main.py`` passes it in.
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
    """Clips sampled from the EMA weights during training, written to ``samples/`` in the run directory."""

    every_steps: int | None = None
    """Steps between samples; None is off."""
    num_clips: int = 8
    """Clips per sampling, divided among the ranks. Clip i always has seed i and the task, context, class and text of
    the same held-out clip."""
    num_inference_steps: int = 50
    """Network evaluations per frame from noise to data; a clip takes up to twice as many."""
    max_frames: int = 64
    """Maximum latent frames of a clip."""
    guidance: float | None = None
    """Classifier-free guidance scale on the velocity; None is off."""

    def __post_init__(self) -> None:
        rules = {
            "every_steps": integer(at_least=1).or_null("off"),
            "num_clips": integer(at_least=1),
            "num_inference_steps": integer(at_least=1),
            "max_frames": integer(at_least=1),
            "guidance": number().or_null("off"),
        }
        check_ranges("samples", self, rules)


class StepSampler(Protocol):
    """Samples clips of a run."""

    def sample(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        """Sample and write this rank's clips, and return their records. All ranks call the model equally often."""

    def join(self, step: int, records: list[dict[str, Any]]) -> Path | None:
        """Write the list of all ranks' clips, and return a contact sheet of them. Called on one rank."""


def take_samples(sampler: StepSampler, engine: Any, step: int, ranks: Ranks) -> Path | None:
    """Sample from the engine's current weights. Collective.

    Args:
        sampler: The sampler.
        engine: DeepSpeed engine; switched to evaluation mode and back.
        step: Steps done.
        ranks: This rank.

    Returns:
        On rank 0, the contact sheet of all clips if it could be made; otherwise None.
    """
    engine.eval()
    own = sampler.sample(engine, step)
    engine.train()
    records = [record for part in gather_values(own) for record in part]
    return sampler.join(step, records) if ranks.is_main else None
