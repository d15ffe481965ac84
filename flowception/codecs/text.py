"""Captions to text embeddings with a T5 encoder. The embeddings are ragged, without padding tokens.

LTX-Video conditions on T5-XXL (width 4096, up to 128 tokens). A caption's embedding does not depend on the rest of the
batch, because padding is masked inside T5 and then removed.

Shape legend: ``L`` tokens of a caption (end token included), ``D`` width of the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowception.errors import CodecError, ConfigError, require
from flowception.ranges import check_ranges, integer


@dataclass(kw_only=True)
class TextEncoderConfig:
    """The text encoder, if any."""

    model: str | None = None
    """Folder or hub id of a T5 encoder (or of a pipeline with ``text_encoder`` and ``tokenizer``); None for no text."""
    max_tokens: int = 128
    """Longer captions are truncated."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the computation."""

    def __post_init__(self) -> None:
        check_ranges("text", self, {"max_tokens": integer(at_least=1)})


class TextEncoder:
    """A T5 encoder and its tokenizer."""

    def __init__(
        self, tokenizer: Any, model: Any, *, max_tokens: int = 128, device: torch.device | str = "cpu"
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)
        self.max_tokens = max_tokens
        self.text_dim = int(model.config.d_model)
        """D."""

    @classmethod
    def from_config(cls, config: TextEncoderConfig, device: torch.device | str = "cpu") -> TextEncoder:
        """Load encoder and tokenizer from a local folder or the hub.

        Raises:
            ConfigError: If ``text.model`` is not set.
            CodecError: If no encoder can be loaded from it.
        """
        if config.model is None:
            raise ConfigError("text.model must be set, got null; set it to a folder or hub id of a T5 encoder")
        transformers = require("transformers", extra="ltx")
        errors = []
        for in_pipeline in (False, True):
            where = [{"subfolder": name} if in_pipeline else {} for name in ("tokenizer", "text_encoder")]
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, **where[0])
                model = transformers.T5EncoderModel.from_pretrained(
                    config.model, dtype=getattr(torch, config.dtype), use_safetensors=True, **where[1]
                )
            except (OSError, ValueError, ImportError) as error:
                errors.append(str(error))
            else:
                return cls(tokenizer, model, max_tokens=config.max_tokens, device=device)
        raise CodecError(
            f"cannot load a T5 encoder from text.model {config.model!r} ({' / '.join(errors)}); set it to a folder "
            "with config.json, safetensors weights and a tokenizer, or to a pipeline's folder or hub id"
        )

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed captions.

        Args:
            captions: The captions; an empty one has only the end token.

        Returns:
            float32 [L_i, D] on the CPU for each caption.
        """
        if not captions:
            return []
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        mask = tokens["attention_mask"].to(self._device)
        hidden = self._model(input_ids=tokens["input_ids"].to(self._device), attention_mask=mask).last_hidden_state
        return [row[keep.bool()].float().cpu() for row, keep in zip(hidden, mask, strict=True)]
