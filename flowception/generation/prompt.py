"""A prompt becomes text embeddings, by the encoder that made the run's shards.

Shape legend: ``L, D`` text tokens and their width.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from flowception.codecs.text import TextEncoder, TextEncoderConfig
from flowception.data.schema import same_text
from flowception.errors import ConfigError
from flowception.generation.load import LoadedRun


def encode_prompt(run: LoadedRun, prompt: str, text_encoder: str | None, device: torch.device) -> Tensor:
    """Embed a prompt.

    Args:
        run: A run that was trained with text.
        prompt: The caption; an empty one is the null text, as in training.
        text_encoder: Folder or hub id of the T5 encoder; None takes the one that the shard set names.
        device: Where the encoder computes.

    Returns:
        float32 [L, D].

    Raises:
        ConfigError: If the model takes no text, or the encoder is not the one that made the shards.
    """
    if run.null_text is None:
        raise ConfigError("--prompt was given and the model was trained without text; leave it out")
    if not prompt.strip():
        return run.null_text
    known = {field.name for field in fields(TextEncoderConfig)}
    config = TextEncoderConfig(**{name: value for name, value in run.meta.text_config.items() if name in known})
    if text_encoder is not None:
        config = replace(config, model=text_encoder)
    if config.model is None:
        raise ConfigError("--prompt needs --text-encoder, a folder or hub id of the T5 encoder that made the shards")
    encoder = TextEncoder.from_config(config, device)
    width = run.null_text.shape[1]
    if encoder.text_dim != width:
        raise ConfigError(f"{config.model} gives text of width {encoder.text_dim}, the model was trained with {width}")
    if not same_text(run.null_text, encoder.encode([""])[0]):
        raise ConfigError(
            f"{config.model} embeds the empty caption otherwise than the encoder that made the shards; "
            "give that encoder with --text-encoder"
        )
    return encoder.encode([prompt])[0]
