"""Read the prompts of a job, and embed them with the text encoder that made the run's shards.

Shape legend: ``L, D`` text tokens and their width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowception.codecs.text import TextEncoder, TextEncoderConfig
from flowception.errors import ConfigError
from flowception.generation.load import LoadedRun
from flowception.shards.schema import same_text

logger = logging.getLogger(__name__)

_KEYS = ("prompt", "seed", "class_label")
LARGEST_SEED = 2**62


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A line of a prompts file."""

    text: str
    """The caption; an empty one means the null text, as in training."""
    seed: int | None = None
    """Seed of the prompt's first clip; its later clips count up from it. None: clip i has the job's seed + i."""
    class_label: str | None = None
    """Class number or name, or ``null``; None uses the job's class."""
    place: str = "`prompt`"
    """Where the prompt comes from, for messages."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read a UTF-8 prompts file, skipping blank lines.

    Args:
        path: With suffix ``.jsonl``, every line is an object with ``prompt`` and optionally ``seed`` and
            ``class_label``, as in ``clips.jsonl``. Otherwise every line is a caption.

    Returns:
        The prompts in order, at least one.

    Raises:
        ConfigError: If the file cannot be read, has no prompt, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read --prompts {path} ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {path} is not UTF-8 ({error}); save it as UTF-8") from error
    numbered = [(f"--prompts {path}, line {number}", line.strip()) for number, line in enumerate(lines, 1)]
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    prompts = [parse(line, place) for place, line in numbered if line]
    if not prompts:
        raise ConfigError(f"--prompts {path} has no prompt; write one per line")
    return prompts


def _from_text(line: str, place: str) -> Prompt:
    return Prompt(text=line, place=place)


def _from_json(line: str, place: str) -> Prompt:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is not JSON ({error}); write one object per line") from error
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise ConfigError(f'{place} must be an object with a prompt, such as {{"prompt": "..."}}, got {line[:80]}')
    if unknown := sorted(content.keys() - set(_KEYS)):
        raise ConfigError(f"{place} has unknown key {unknown[0]!r}; allowed keys are {', '.join(_KEYS)}")
    seed = content.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED):
        raise ConfigError(f"{place}: seed must be an integer from 0 to {LARGEST_SEED}, got {seed!r}")
    label = content.get("class_label")
    if label is not None and (not isinstance(label, str | int) or isinstance(label, bool)):
        raise ConfigError(f"{place}: class_label must be a number, a name or null, got {label!r}")
    word = str("null" if label is None else label) if "class_label" in content else None
    return Prompt(text=content["prompt"].strip(), seed=seed, class_label=word, place=place)


def encode_prompts(
    run: LoadedRun, prompts: Iterable[str | None], text_encoder: str | None, device: torch.device
) -> dict[str | None, Tensor]:
    """Embed prompts; warn if a model with text gets none.

    Args:
        run: The run.
        prompts: Caption of each clip; empty or None means the null text, as in training. Captions are encoded one by
            one, so that an embedding does not depend on the other captions, to the bit.
        text_encoder: Folder or hub id of the T5 encoder; None uses the one named in the shard set.
        device: Device of the encoder.

    Returns:
        bfloat16 [L, D] for each caption, on the CPU, as stored in shards; empty for a model without text.

    Raises:
        ConfigError: If the model was trained without text, or the encoder is not the one that made the shards.
    """
    unique = dict.fromkeys(prompts)
    if run.null_text is None:
        if any(prompt is not None for prompt in unique):
            raise ConfigError("the model was trained without text and takes no prompt; drop it")
        return {}
    if set(unique) == {None}:
        logger.warning("clips are unconditional: the model was trained with text, but got no prompt")
    null_text = run.null_text
    captions = [prompt for prompt in unique if prompt is not None and prompt.strip()]
    embedded: dict[str | None, Tensor] = {prompt: null_text for prompt in unique if not (prompt or "").strip()}
    if captions:
        encoder = _matching_encoder(run, null_text, text_encoder, device)
        embedded |= {caption: encoder.encode([caption])[0].bfloat16() for caption in captions}
    return embedded


def _matching_encoder(run: LoadedRun, null_text: Tensor, text_encoder: str | None, device: torch.device) -> TextEncoder:
    """Build the encoder and check its embedding of the empty caption against the shards."""
    known = {field.name for field in fields(TextEncoderConfig)}
    settings: dict[str, Any] = {name: value for name, value in run.meta.text_config.items() if name in known}
    config = TextEncoderConfig(**settings)
    if text_encoder is not None:
        config = replace(config, model=text_encoder)
    if config.model is None:
        raise ConfigError("prompts need `text_encoder`: the folder or hub id of the T5 encoder that made the shards")
    encoder = TextEncoder.from_config(config, device)
    width = null_text.shape[1]
    if encoder.text_dim != width:
        raise ConfigError(
            f"text encoder {config.model} must have width {width}, as in training, got {encoder.text_dim}"
        )
    if not same_text(null_text, encoder.encode([""])[0]):
        raise ConfigError(
            f"text encoder {config.model} embeds the empty caption differently from the encoder that made the shards; "
            "set `text_encoder` to that encoder"
        )
    return encoder
