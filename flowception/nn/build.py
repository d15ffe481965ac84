"""Builds the backbone named by a configuration.

A backbone is a module with ``forward(pack: PackInput) -> ModelOutput`` (docs/method.md) and an attribute ``spec``
(``ModelSpec``), whose submodules define their initial weights (``nn.init``). Training, generation and export all build
it here.
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
    """Build the network of a configuration, with uninitialized weights.

    Raises:
        ConfigError: If the backbone is unknown.
    """
    one_of(BACKBONES).check("model.backbone", config.backbone)
    return BACKBONES[config.backbone](config)


def count_parameters(config: DiTConfig) -> int:
    """Number of parameters of a network, counted on the meta device without allocating memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_backbone(config).parameters())
