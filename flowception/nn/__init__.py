"""The network: attention, rotary positions, the Flowception DiT, its presets, and its compiled functions."""

from flowception.nn.attention import attention, choose_backend
from flowception.nn.build import BACKBONES, build_backbone, count_parameters
from flowception.nn.dit import FlowceptionDiT
from flowception.nn.pattern import AttentionPattern
from flowception.nn.presets import PRESETS, DiTConfig
from flowception.packing.flops import ModelSpec, attention_flops, clip_flops, training_flops
from flowception.packing.layout import (
    ClipShape,
    ModelOutput,
    ModelRole,
    PackInput,
    PackLayout,
    PackShape,
    TokenKind,
    build_layout,
)

__all__ = [
    "BACKBONES",
    "PRESETS",
    "AttentionPattern",
    "ClipShape",
    "DiTConfig",
    "ModelSpec",
    "FlowceptionDiT",
    "ModelOutput",
    "ModelRole",
    "PackInput",
    "PackLayout",
    "PackShape",
    "TokenKind",
    "attention",
    "attention_flops",
    "build_backbone",
    "build_layout",
    "choose_backend",
    "clip_flops",
    "count_parameters",
    "training_flops",
]
