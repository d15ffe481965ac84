"""Compares sampling with cached keys and values of finished frames in bfloat16 with float32 on the CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu.outcome import PASS, CheckFailed, Outcome
from benchmarks.gpu.scene import Scene, open_model, relative_error
from flowception.flow import SamplerConfig, SamplerState, sample
from flowception.generation.kv_cache import CachedPredictor
from flowception.nn.dit import FlowceptionDiT

_LARGEST_ERROR = 0.03
"""Of velocities and rates, by a network with large weights in bfloat16; on a CPU it is 0.005."""
_STEPS, _CLIPS, _REFRESH_STEPS = 6, 3, 3


class Pair:
    """A predictor that evaluates two, records the error of the second, and returns the output of the first."""

    def __init__(self, first: CachedPredictor, second: CachedPredictor) -> None:
        self.first, self.second = first, second
        self.errors: list[float] = []
        self.narrow = 0
        """Evaluations that computed only live frames."""

    def __call__(self, state: SamplerState) -> tuple[Tensor, Tensor]:
        """Evaluate both predictors."""
        expected, found = self.first(state), self.second(state)
        self.errors.append(max(relative_error(ours, theirs) for ours, theirs in zip(found, expected, strict=True)))
        self.narrow += not self.second.refreshes(state)
        return expected


def cached_sampling(scene: Scene) -> Outcome:
    """Evaluate both predictors on the same states, those of a float32 sampling run."""
    case = scene.small()
    generator = torch.Generator().manual_seed(1)
    width = case.config.model.spec().text_dim or 0
    texts = [torch.randn(3 + clip, width, generator=generator) for clip in range(_CLIPS)]
    settings: dict[str, Any] = {"texts": texts, "null_text": torch.zeros(1, width), "guidance": 1.5}
    settings["refresh_steps"] = _REFRESH_STEPS
    models = [cast(FlowceptionDiT, open_model(case.config).eval()) for _ in range(2)]
    models[1].to(scene.device)
    labels = [-1] * _CLIPS
    pair = Pair(
        CachedPredictor(models[0], labels, **settings),
        CachedPredictor(models[1], labels, autocast_dtype=torch.bfloat16, **settings),
    )
    sample(
        predict=pair,
        frame_shape=(case.reader.latent_channels, case.clip.height, case.clip.width),
        batch_size=_CLIPS,
        config=SamplerConfig(num_inference_steps=_STEPS, num_start_frames=2, max_frames=6),
        seed=3,
    )
    worst = max(pair.errors)
    figures = {"largest_error": worst, "evaluations": len(pair.errors), "narrow_evaluations": pair.narrow}
    said = f"error {worst:.2g} of {len(pair.errors)} evaluations, {pair.narrow} of them with cached keys and values"
    if not pair.narrow:
        raise CheckFailed(f"{said}; at least one evaluation must use the cache", figures)
    if not worst <= _LARGEST_ERROR:
        raise CheckFailed(f"{said}; the error must be at most {_LARGEST_ERROR}", figures)
    return Outcome(PASS, said, figures)
