"""AdamW with two parameter groups, and the learning rate as a pure function of the step.

Weight decay applies to weights with two or more dimensions, but not to vectors (biases, norm scales) or embedding
tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from flowception.ranges import check_ranges, integer, list_of, number, one_of
from flowception.training.distributed.zero import full_shape

LrSchedule = Literal["constant", "linear", "cosine"]


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-4
    """Learning rate after warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay of weights with two or more dimensions, except embeddings."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    warmup_steps: int = 1000
    """Optimizer steps over which the learning rate rises linearly from 0."""
    lr_schedule: LrSchedule = "constant"
    """Schedule after warm-up: constant, or linear or cosine decay to ``lr_end_ratio`` at ``max_steps``."""
    lr_end_ratio: float = 0.1
    """Ratio of the final learning rate (at ``max_steps``) to ``lr``, for linear and cosine."""
    clip_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this value; None is off."""

    def __post_init__(self) -> None:
        rules = {
            "lr": number(above=0),
            "weight_decay": number(at_least=0),
            "betas": list_of(number(at_least=0, below=1), length=2),
            "eps": number(above=0),
            "warmup_steps": integer(at_least=0),
            "lr_schedule": one_of(("constant", "linear", "cosine")),
            "lr_end_ratio": number(at_least=0, at_most=1),
            "clip_grad_norm": number(above=0).or_null("off"),
        }
        check_ranges("optim", self, rules)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of an optimizer step.

    Args:
        config: The schedule.
        step: Number of the current step, from 0. The first step of a warm-up of n steps uses ``lr / n``.
        max_steps: Total steps of the run, where the decay ends.

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
    """Split the model's parameters into two groups, with and without weight decay.

    Partitioned weights (ZeRO-3) are supported.
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
    """Build AdamW over the two groups. It is fused on CUDA, to avoid temporary copies.

    Args:
        model: The model; its parameters need not be on ``device`` yet.
        config: The optimizer.
        device: Device to train on.

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
