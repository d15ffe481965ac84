"""Networks by name: a name becomes a backbone, and another one can be added."""

import pytest
from torch import nn

from flowception.errors import ConfigError
from flowception.nn import BACKBONES, DiTConfig, FlowceptionDiT, build_backbone, count_parameters


def test_the_default_is_the_dit():
    assert isinstance(build_backbone(DiTConfig()), FlowceptionDiT)


def test_a_backbone_of_ones_own_is_built_and_counted(monkeypatch):
    monkeypatch.setitem(BACKBONES, "own", lambda config: nn.Linear(config.spec().hidden_size, 1))
    assert count_parameters(DiTConfig(backbone="own")) == 128 + 1


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="model.backbone must be one of dit.*, got 'unet'"):
        build_backbone(DiTConfig(backbone="unet"))
