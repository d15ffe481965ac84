"""Networks by name: a configuration becomes the backbone it names.

A backbone is a module with ``forward(pack: PackInput) -> ModelOutput`` (DESIGN.md section 3) whose ``spec`` is its
``ModelSpec`` and whose parts say how their weights begin (``nn.init``). Trainer, generation and export build it
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from flowception.nn.dit import FlowceptionDiT
from flowception.nn.presets import DiTConfig
from flowception.ranges import one_of

BACKBONES: dict[str, Callable[[DiTConfig], nn.Module]] = {"dit": FlowceptionDiT}
"""Every backbone by the value of ``model.backbone``."""


def build_backbone(config: DiTConfig) -> nn.Module:
    """The network of a configuration, its weights not yet initialized.

    Raises:
        ConfigError: If there is no backbone of that name.
    """
    one_of(BACKBONES).check("model.backbone", config.backbone)
    return BACKBONES[config.backbone](config)


def count_parameters(config: DiTConfig) -> int:
    """Parameters of a network, counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_backbone(config).parameters())
