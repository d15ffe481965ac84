"""AdamW, its two parameter groups, and the learning rate as a pure function of the step.

Weights with two or more dimensions decay; vectors (biases, norm scales) and embedding tables do not.
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
