"""The trainer's engine and training steps, without a run directory.

The weights are random numbers generated on the device. Real initialization runs on the CPU and takes a minute for 2
billion parameters. There is no EMA and no saver, which would pin 16 bytes of host memory per parameter.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.scene import Case, Scene
from flowception.data.loader import StepBatch
from flowception.nn.build import build_backbone
from flowception.training.distributed.collectives import Ranks
from flowception.training.distributed.launch import init_distributed
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.distributed.zero import build_engine, deepspeed_config, optimizer_step
from flowception.training.optim import build_optimizer
from flowception.training.step import run_micro_steps

_WEIGHT_SCALE = 0.02


class Training:
    """A network under DeepSpeed on one rank, with random weights."""

    def __init__(self, scene: Scene, case: Case, packs: int) -> None:
        """Build it.

        Args:
            scene: The device.
            case: The configuration.
            packs: Micro-steps per step.
        """
        self.scene, self.config = scene, case.config
        self.ranks: Ranks = init_distributed()
        config, device = case.config, self.ranks.device
        self.engine: Any = build_engine(
            lambda: build_backbone(config.model),
            lambda model: build_optimizer(model, config.optim, device),
            deepspeed_config(config.zero, config.precision, packs, config.optim.clip_grad_norm, device),
            device,
        )
        shards = ShardedState(self.engine)
        shards.ema.clear()
        generator = torch.Generator(device).manual_seed(0)
        for master in shards.tensors("weight"):
            master.normal_(0.0, _WEIGHT_SCALE, generator=generator)
        shards.push()
        shards.set_learning_rate(config.optim.lr)

    def micro_steps(self, batch: StepBatch) -> float:
        """Forward and backward passes of a step; returns its velocity loss."""
        seen = run_micro_steps(self.engine, batch, self.ranks, self.config.process.insertion_loss_weight)
        return seen.velocity_sum / batch.step_plan.velocity_denominator

    def optimizer_step(self) -> None:
        """The optimizer's step."""
        outcome = optimizer_step(self.engine, self.config.optim.clip_grad_norm, lambda norm: None, self.ranks.device)
        if not outcome.applied:
            raise RuntimeError(f"the optimizer rejected the step: {outcome.refused}")

    def timed_step(self, batch: StepBatch) -> tuple[float, float, float]:
        """A complete step: seconds of its passes, seconds of the optimizer, and the loss."""
        self.scene.synchronize()
        started = time.perf_counter()
        loss = self.micro_steps(batch)
        self.scene.synchronize()
        middle = time.perf_counter()
        self.optimizer_step()
        self.scene.synchronize()
        return middle - started, time.perf_counter() - middle, loss


def pinned(scene: Scene, batch: StepBatch) -> StepBatch:
    """A step with its packs in page-locked memory, as the loader returns them on a GPU machine."""
    return replace(batch, packs=[pack.pin_memory() for pack in batch.packs]) if scene.on_gpu else batch
