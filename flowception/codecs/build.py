"""The codec that a configuration names."""

from __future__ import annotations

import torch

from flowception.codecs.base import Codec, CodecConfig
from flowception.errors import ConfigError


def build_codec(config: CodecConfig, device: torch.device | str = "cpu") -> Codec:
    """Make the codec that ``config`` names.

    Args:
        config: Which codec.
        device: Where a codec with weights computes.

    Returns:
        The codec, ready to use.
    """
    if config.name == "patchify":
        from flowception.codecs.patchify import PatchifyCodec

        return PatchifyCodec(config.patch_size)
    if config.name == "ltx":
        from flowception.codecs.ltx import LTXCodec

        return LTXCodec.from_config(config, device)
    raise ConfigError(f"codec.name must be one of patchify, ltx, got {config.name!r}")
