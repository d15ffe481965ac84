"""AdamW, its two parameter groups, and the learning rate as a pure function of the step.

Weights with two or more dimensions decay; vectors (biases, norm scales) and embedding tables do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from flowception.errors import ConfigError
from flowception.training.distributed.zero import full_shape

LrSchedule = Literal["constant", "linear", "cosine"]


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-4
    """Learning rate after warm-up."""
    weight_decay: float = 0.01
    """Decoupled decay of weights with two or more dimensions, embeddings excepted."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup_steps: int = 1000
    """Optimizer steps over which the learning rate rises linearly from 0."""
    lr_schedule: LrSchedule = "constant"
    """After warm-up: constant, or linear or cosine decay to ``lr_end_ratio`` at ``max_steps``."""
    lr_end_ratio: float = 0.1
    """Learning rate at ``max_steps`` over ``lr``, for linear and cosine."""
    clip_grad_norm: float | None = 1.0
    """Largest global gradient norm; None is off."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"optim.lr is {self.lr}; give a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optim.weight_decay is {self.weight_decay}; give 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas is {list(self.betas)}; give two numbers in [0, 1)")
        if not 0 < self.eps < math.inf:
            raise ConfigError(f"optim.eps is {self.eps}; give a number above 0")
        if self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps is {self.warmup_steps}; give 0 or more")
        if self.lr_schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(f"optim.lr_schedule is {self.lr_schedule!r}; choose constant, linear or cosine")
        if not 0 <= self.lr_end_ratio <= 1:
            raise ConfigError(f"optim.lr_end_ratio is {self.lr_end_ratio}; give a number in [0, 1]")
        if self.clip_grad_norm is not None and not 0 < self.clip_grad_norm < math.inf:
            raise ConfigError(f"optim.clip_grad_norm is {self.clip_grad_norm}; give a number above 0, or null for off")


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of an optimizer step.

    Args:
        config: The schedule.
        step: Number of the step being taken, from 0. The first step of a warm-up of n uses ``lr / n``.
        max_steps: Steps of the run, where a decay ends.

    Returns:
        The learning rate.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps))
    remaining = 1 - progress if config.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.lr_end_ratio + (1 - config.lr_end_ratio) * remaining)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """The model's parameters in two groups: with weight decay and without.

    Works on partitioned weights too (ZeRO-3).
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        dimensions = len(full_shape(parameter))
        (decay if dimensions >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the two groups; the learning rate is set before each step. Fused on CUDA: no temporary copies.

    Args:
        model: Its parameters, which need not be where they will be trained.
        config: The optimizer.
        device: Where they will be trained.

    Returns:
        The optimizer.
    """
    first, second = config.betas
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(first, second),
        eps=config.eps,
        fused=device.type == "cuda",
    )
