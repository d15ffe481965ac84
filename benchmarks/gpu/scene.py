"""Inputs of the checks: the recipe's network and packs on a GPU, a small network on a CPU, both with synthetic clips.

Shape legend: ``T`` tokens of a pack, ``C h w`` a latent frame, ``D`` text width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from benchmarks.gpu.outcome import NEEDS_GPU, Outcome
from flowception.data.loader import StepBatch
from flowception.data.pack import Pack, build_pack, empty_pack
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor, PackPlan, StepPlan
from flowception.flow.loss import insertion_loss_sum, velocity_loss_sum
from flowception.nn.build import build_backbone
from flowception.packing.flops import training_flops
from flowception.packing.layout import ClipShape, ModelOutput
from flowception.shards.index import ClipIndex
from flowception.training.config import TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "t2v_2b.yaml"
RECIPE_CLIP = ClipShape(19, 8, 8, 128)
"""The clips of the recipe's header comment."""
SMALL_CLIP = ClipShape(5, 2, 2, 3)
COMMON_WORDS = ("packs_per_step=2", "model.activation_checkpointing=false")
SMALL_WORDS = (
    "model.preset=null",
    "model.in_channels=8",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.text_dim=16",
    "token_budget=128",
    "optim.warmup_steps=0",
    "zero.param_persistence_threshold=0",
)
SMALL_WIDTH = {"cuda": 128, "cpu": 32}
"""A CPU may have no bfloat16 units."""
_CLIPS = 600
"""Size of the synthetic set. The pack shape depends only on the longest and smallest clip, and all are equal."""
NULL_TEXT_TOKENS = 1


@dataclass(frozen=True)
class MadeUpClips:
    """A ``ClipReader`` that returns random latents and texts."""

    clip: ClipShape
    latent_channels: int
    text_width: int | None

    @property
    def null_text(self) -> Tensor | None:
        """A text of zeros."""
        return None if self.text_width is None else torch.zeros(NULL_TEXT_TOKENS, self.text_width).bfloat16()

    def read_clip(self, row: int, frames: ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Frames and text of the clip of a row, a function of the row."""
        generator = torch.Generator().manual_seed(row)
        shape = (self.clip.frames, self.latent_channels, self.clip.height, self.clip.width)
        latents = torch.randn(shape, generator=generator)[torch.as_tensor(np.asarray(frames))]
        if self.text_width is None:
            return latents.bfloat16(), None
        return latents.bfloat16(), torch.randn(self.clip.text_tokens, self.text_width, generator=generator).bfloat16()

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        """Nothing to prefetch."""

    def describe(self, row: int) -> str:
        """Name of the clip for messages."""
        return f"synthetic clip {row}"


@dataclass(frozen=True)
class Case:
    """A configuration with clips to train on."""

    config: TrainConfig
    clip: ClipShape

    @cached_property
    def plan(self) -> Plan:
        """The plan of a set of these clips."""
        index = ClipIndex.from_arrays(
            frames=np.full(_CLIPS, self.clip.frames),
            height=self.clip.height,
            width=self.clip.width,
            text_tokens=self.clip.text_tokens,
        )
        spec = self.config.model.spec()
        config, null = self.config, NULL_TEXT_TOKENS
        return Plan(index, None, config.process, config.plan, spec, config.seed, null_text_tokens=null)

    @cached_property
    def reader(self) -> MadeUpClips:
        """Reader of the clips."""
        spec = self.config.model.spec()
        return MadeUpClips(self.clip, spec.in_channels, spec.text_dim)

    def batch(self, step: int) -> StepBatch:
        """A step of the plan, as the loader returns it to a single rank."""
        cursor = Cursor(0, step)
        planned = self.plan.step(cursor)
        packs = [build_pack(self.plan, pack, self.reader) for pack in planned.packs]
        return StepBatch(planned, packs, cursor, self.plan.next(cursor), [])

    def padding(self) -> Pack:
        """A pack of padding only."""
        return empty_pack(self.plan)

    def pack_clips(self, pack: PackPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Visible frames and text tokens of a pack's clips."""
        draws = self.plan.clip_draws(pack)
        return draws.clips.visible_frames.numpy(), draws.text_tokens

    def pack_flops(self, pack: PackPlan) -> float:
        """Exact FLOPs of a pack's forward and backward pass, excluding padding and recomputation."""
        frames, text = self.pack_clips(pack)
        spec = self.config.model.spec()
        return float(training_flops(spec, frames, self.clip.height, self.clip.width, text).sum())


@dataclass(frozen=True)
class Scene:
    """Device and working folder of a check."""

    device: torch.device
    folder: Path
    """Folder for its files."""

    @classmethod
    def of(cls, device: str, folder: Path) -> Scene:
        """The scene for a device name."""
        return cls(torch.device(device, 0) if device == "cuda" else torch.device(device), folder)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, which uses the recipe's sizes."""
        return self.device.type == "cuda"

    def recipe(self, *words: str) -> Case:
        """The recipe with 2 billion parameters on a GPU; the small case on a CPU."""
        if not self.on_gpu:
            return self.small(*words)
        return Case(load_config([RECIPE], [*COMMON_WORDS, *words]), RECIPE_CLIP)

    def small(self, *words: str) -> Case:
        """A small network and small clips, on either device."""
        width = f"model.hidden_size={SMALL_WIDTH[self.device.type]}"
        return Case(load_config([RECIPE], [*COMMON_WORDS, *SMALL_WORDS, width, *words]), SMALL_CLIP)

    @property
    def note_path(self) -> Path:
        """File of the check's outcome, and of its partial results before that."""
        return self.folder / "outcome.json"

    def note(self, outcome: Outcome) -> None:
        """Save partial results, which are kept if the check is killed."""
        outcome.save(self.note_path)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def median_ms(self, function: Callable[[], Any], repeats: int = 10, warmup: int = 3) -> float:
        """Median milliseconds of a function, by CUDA events on a GPU."""
        for _ in range(warmup if self.on_gpu else 1):
            function()
        self.synchronize()
        return median(self._times_ms(function, repeats if self.on_gpu else 2))

    def _times_ms(self, function: Callable[[], Any], repeats: int) -> list[float]:
        if not self.on_gpu:
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                function()
                times.append((time.perf_counter() - started) * 1e3)
            return times
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in pairs:
            start.record()
            function()
            stop.record()
        self.synchronize()
        return [float(start.elapsed_time(stop)) for start, stop in pairs]


def needs_gpu(reason: str) -> Outcome:
    """The outcome of a check that does not apply to a CPU."""
    return Outcome(NEEDS_GPU, reason)


def open_model(config: TrainConfig, seed: int = 0) -> nn.Module:
    """The network of a configuration with nonzero gates and outputs; their initial zeros would hide errors."""
    model: Any = build_backbone(config.model)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def training_loss(output: ModelOutput, pack: Pack, step: StepPlan, insertion_loss_weight: float) -> Tensor:
    """The loss of a micro-step, as in ``training.step`` for one rank with one pack."""
    velocity = velocity_loss_sum(output.velocity, pack.velocity_target, pack.velocity_mask, pack.weight_token)
    insertion = insertion_loss_sum(output.log_rate, pack.missing, pack.insertion_mask, pack.weight_frame)
    return velocity / step.velocity_denominator + insertion_loss_weight * insertion / step.insertion_denominator


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in float64; NaN if anything is not finite."""
    found, expected = found.detach().double(), expected.detach().to(found.device).double()
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
