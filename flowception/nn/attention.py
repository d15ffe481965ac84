"""The one door to attention: every clip of a pack attends to itself, in full, and to nothing else.

Backends, all equal up to rounding:

* ``sdpa``: ``scaled_dot_product_attention`` segment by segment, without a mask. The reference, and the way on a CPU;
  neighbouring segments of equal length go through one call.
* ``varlen``: ``torch.nn.attention.varlen`` (FlashAttention-2 built into torch), CUDA in half precision.
* ``flash``: ``flash_attn_varlen_func`` of the flash-attn package, CUDA in half precision.

Shape legend: ``T`` tokens of the pack, ``H`` heads, ``d`` width of a head, ``S`` segments.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from itertools import groupby
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flowception.errors import ConfigError, require
from flowception.nn.layout import PackLayout

AttentionBackend = Literal["auto", "sdpa", "varlen", "flash"]
BACKENDS = ("auto", "sdpa", "varlen", "flash")
PATTERNS = ("full",)
_HALF = (torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


class Attend(Protocol):
    """What a block calls: queries, keys and values ``[T, H, d]`` and the layout, giving ``[T, H, d]``."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
        """Attend within each segment."""


@lru_cache(maxsize=32)
def choose_backend(device: torch.device, dtype: torch.dtype, requested: str = "auto") -> str:
    """Choose the backend for a device and dtype; the choice and its reason are logged once.

    Args:
        device: Where the tensors are.
        dtype: Their dtype.
        requested: ``auto``, or a backend that must be used.

    Returns:
        ``sdpa``, ``varlen`` or ``flash``.

    Raises:
        ConfigError: If the requested backend is unknown or cannot run there.
    """
    if requested not in BACKENDS:
        raise ConfigError(f"attention_backend is {requested!r}; choose one of {', '.join(BACKENDS)}")
    half_on_cuda = device.type == "cuda" and dtype in _HALF
    if requested in ("varlen", "flash") and not half_on_cuda:
        raise ConfigError(
            f"attention_backend={requested} needs CUDA in bfloat16 or float16, this is {device.type} in {dtype}; "
            "use attention_backend=auto"
        )
    if requested != "auto":
        choice, reason = requested, "it was asked for"
    elif half_on_cuda:
        choice, reason = "varlen", "CUDA in half precision, built into torch"
    else:
        choice, reason = "sdpa", f"variable-length kernels do not run on {device.type} in {dtype}"
    logger.info("attention backend: %s (%s)", choice, reason)
    return choice


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackLayout,
    pattern: str = "full",
    backend: str = "auto",
) -> Tensor:
    """Attention inside each segment of a pack.

    Args:
        query: ``[T, H, d]``.
        key: ``[T, H, d]``.
        value: ``[T, H, d]``.
        layout: Where the segments are.
        pattern: Which tokens of a clip see each other; only ``full`` for now.
        backend: ``auto`` or the backend to use.

    Returns:
        ``[T, H, d]``.

    Raises:
        ConfigError: If the pattern or backend is unknown, or the backend cannot run here.
    """
    if pattern not in PATTERNS:
        raise ConfigError(f"attention pattern is {pattern!r}; only {', '.join(PATTERNS)} works so far")
    choice = choose_backend(query.device, query.dtype, backend)
    if choice == "varlen":
        return _varlen(query, key, value, layout)
    if choice == "flash":
        return _flash(query, key, value, layout)
    return _sdpa(query, key, value, layout)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
    """Runs of equally long segments become a batch: a view, nothing is copied."""
    runs = [(length, len(list(run))) for length, run in groupby(layout.segment_lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    parts = zip(runs, query.split(sizes), key.split(sizes), value.split(sizes))
    for (length, count), *tensors in parts:
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in tensors)
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
    module = require("torch.nn.attention.varlen")
    boundaries, longest = layout.cu_seqlens, layout.max_seqlen
    output: Tensor = module.varlen_attn(query, key, value, boundaries, boundaries, longest, longest)
    return output


def _flash(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
    module = require("flash_attn", extra="flash")
    output: Tensor = module.flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=layout.cu_seqlens,
        cu_seqlens_k=layout.cu_seqlens,
        max_seqlen_q=layout.max_seqlen,
        max_seqlen_k=layout.max_seqlen,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output
