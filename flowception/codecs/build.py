"""Builds the codec named by a configuration."""

from __future__ import annotations

import torch

from flowception.codecs.base import Codec, CodecConfig
from flowception.errors import ConfigError


def build_codec(config: CodecConfig, device: torch.device | str = "cpu") -> Codec:
    """Build the codec named by ``config``.

    Args:
        config: The codec and its settings.
        device: Device of a codec with weights.

    Returns:
        The codec, ready to use.

    Raises:
        ConfigError: If the codec is unknown or ``codec.model`` is missing.
        CodecError: If the weights cannot be loaded.
    """
    if config.name == "patchify":
        from flowception.codecs.patchify import PatchifyCodec

        return PatchifyCodec(config.patch_size)
    if config.name == "ltx":
        from flowception.codecs.ltx import LTXCodec

        return LTXCodec.from_config(config, device)
    raise ConfigError(f"codec.name must be one of patchify, ltx, got {config.name!r}")
