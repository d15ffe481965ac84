"""The network: how packs lie in memory, attention, rotary positions, the Flowception DiT, and its sizes and FLOPs."""

from flowception.nn.attention import attention, choose_backend
from flowception.nn.backbone import BACKBONES, build_backbone, count_parameters
from flowception.nn.dit import FlowceptionDiT
from flowception.nn.flops import FlopSpec, attention_flops, clip_flops, training_flops
from flowception.nn.layout import (
    ClipShape,
    ModelOutput,
    ModelRole,
    PackInput,
    PackLayout,
    PackShape,
    TokenKind,
    build_layout,
)
from flowception.nn.pattern import AttentionPattern
from flowception.nn.presets import PRESETS, DiTConfig

__all__ = [
    "BACKBONES",
    "PRESETS",
    "AttentionPattern",
    "ClipShape",
    "DiTConfig",
    "FlopSpec",
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
