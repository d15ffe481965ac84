"""Attention within the clips of a pack: a clip attends only to itself, following the attention pattern.

Backends, all equal up to rounding:

* ``sdpa``: ``scaled_dot_product_attention``, one segment at a time, every pattern. The reference, and the default on a
  CPU. Adjacent segments of equal length share one call. Patterns other than ``full`` use a boolean mask within the
  segment, which saves no computation.
* ``flex``: FlexAttention, every pattern, CUDA (it has no backward on a CPU). Blocks of pairs that the pattern masks
  entirely are skipped.
* ``varlen``: ``torch.nn.attention.varlen``, ``full`` only, CUDA in half precision. FlashAttention-2 is built into
  torch. If the FlashAttention-3 package is installed on a Hopper GPU, torch is switched to it.
* ``flash``: the kernels of an installed flash-attn package, ``full`` only, CUDA in half precision. Version 3 runs
  through ``varlen``; version 2 is called through ``flash_attn_varlen_func``. Its window counts tokens, not frames.

Masks are built once per pack and cached in its layout.

Compiled blocks get their attention from ``bind``. The backend is chosen outside the graph, and whatever differs between
packs enters the graph as tensor contents, or as sizes marked dynamic.

Shape legend: ``T`` tokens of the pack, ``H`` heads, ``d`` head width, ``S`` segments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flowception.errors import ConfigError, require
from flowception.nn import flash
from flowception.nn.flash import VarlenKernel
from flowception.nn.pattern import FULL, AttentionPattern, token_ranks, token_segments, visible_blocks
from flowception.nn.segment_attention import segment_attention
from flowception.packing.layout import PackLayout
from flowception.ranges import one_of

BACKENDS = ("auto", "sdpa", "flex", "varlen", "flash")
FLEX_BLOCK_TOKENS = 128
"""FlexAttention's block size, its default."""
_FULL_ONLY = ("varlen", "flash")
_HALF = (torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


class BoundAttention(NamedTuple):
    """Attention within the segments of one pack."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Queries, keys and values ``[T, H, d]`` to ``[T, H, d]``."""
    in_graph: bool
    """Whether it can be part of a compiled block's graph; otherwise it breaks the graph."""


class Attend(Protocol):
    """Attention of a network: queries, keys and values ``[T, H, d]`` and the layout to ``[T, H, d]``."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
        """Attend within each segment."""


def check_backend(requested: str, pattern: AttentionPattern) -> None:
    """Check that a backend exists and supports the pattern.

    Raises:
        ConfigError: If not; the message lists the backends that do.
    """
    one_of(BACKENDS).check("model.attention_backend", requested)
    if requested in _FULL_ONLY and pattern != FULL:
        raise ConfigError(
            f"model.attention_backend={requested} supports only model.attention_pattern=full, got {pattern.name}; use "
            "model.attention_backend=auto, or sdpa or flex (CUDA), which support every pattern"
        )


@lru_cache(maxsize=32)
def choose_backend(
    device: torch.device, dtype: torch.dtype, requested: str = "auto", pattern: AttentionPattern = FULL
) -> str:
    """Choose the backend for a device, dtype and pattern, and log the choice and its reason once.

    Args:
        device: Device of the tensors.
        dtype: Their dtype.
        requested: ``auto``, or the backend to use.
        pattern: Which tokens see each other.

    Returns:
        ``sdpa``, ``flex``, ``varlen`` or ``flash``; ``varlen`` for ``flash`` with FlashAttention-3.

    Raises:
        ConfigError: If the requested backend is unknown, cannot run on the device or does not support the pattern.
    """
    check_backend(requested, pattern)
    half_on_cuda = device.type == "cuda" and dtype in _HALF
    if requested in _FULL_ONLY and not half_on_cuda:
        raise ConfigError(
            f"model.attention_backend={requested} needs CUDA in bfloat16 or float16, got {device.type} in {dtype}; "
            "use model.attention_backend=auto"
        )
    if requested == "flex" and device.type != "cuda":
        raise ConfigError(
            f"model.attention_backend=flex needs CUDA, got {device.type}, where FlexAttention has no backward; "
            "use model.attention_backend=auto"
        )
    if requested in _FULL_ONLY or (requested == "auto" and half_on_cuda and pattern == FULL):
        fa3 = flash.activate_fa3()
        choice = "flash" if requested == "flash" and not fa3 else "varlen"
        fa2 = "FlashAttention-2 " + ("of the flash-attn package" if choice == "flash" else "built into torch")
        reason = "FlashAttention-3 is installed" if fa3 else fa2
    elif requested != "auto":
        choice, reason = requested, f"requested by model.attention_backend={requested}"
    elif pattern != FULL and device.type == "cuda":
        choice, reason = "flex", f"the kernel for attention_pattern={pattern.name} on CUDA"
    elif pattern != FULL:
        choice, reason = "sdpa", f"the only backend for attention_pattern={pattern.name} on {device.type}"
    else:
        choice, reason = "sdpa", f"variable-length kernels do not run on {device.type} in {dtype}"
    logger.info("attention backend: %s (%s)", choice, reason)
    return choice


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackLayout,
    pattern: AttentionPattern = FULL,
    backend: str = "auto",
    key_layout: PackLayout | None = None,
) -> Tensor:
    """Attention within each segment of a pack.

    Args:
        query: ``[T, H, d]``.
        key: ``[T, H, d]``, or the number of tokens of ``key_layout``.
        value: As ``key``.
        layout: Segments of the queries.
        pattern: Which tokens of a clip see each other.
        backend: ``auto`` or the backend to use.
        key_layout: Segments of keys and values, if they differ from the queries': segment i of the queries attends to
            segment i of the keys (with ``sdpa`` if ``flex`` was requested). None if they are the same.

    Returns:
        ``[T, H, d]``.

    Raises:
        ConfigError: If the backend is unknown, cannot run here or does not support the pattern, or ``key_layout`` is
            given and the pattern is not full.
    """
    if key_layout is not None and pattern != FULL:
        raise ConfigError(
            f"attention_pattern must be full when keys and queries have different layouts, got {pattern.name}"
        )
    choice = choose_backend(query.device, query.dtype, backend, pattern)
    return _attention(query, key, value, layout, layout if key_layout is None else key_layout, pattern, choice)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackLayout,
    keys: PackLayout,
    pattern: AttentionPattern,
    choice: str,
) -> Tensor:
    if choice in _FULL_ONLY:
        longest = layout.max_seqlen, keys.max_seqlen
        return _varlen_kernel(choice)(query, key, value, layout.cu_seqlens, keys.cu_seqlens, *longest)
    if choice == "flex" and keys is layout:
        return _flex(query, key, value, layout, pattern)
    return _sdpa(query, key, value, layout, keys, pattern)


_outside_of_graphs = torch.compiler.disable(_attention)
"""The same for compiled blocks: breaks the graph before and after the call."""


def bind(
    layout: PackLayout, device: torch.device, dtype: torch.dtype, pattern: AttentionPattern, backend: str
) -> BoundAttention:
    """Attention of one pack for compiled blocks, compiled once for all packs of a shape.

    The number of segments and the longest segment vary between packs. Both are passed as tensor sizes marked with
    ``mark_dynamic``, which makes the compiler fail instead of specializing on one of them.

    Args:
        layout: Layout of the pack, on its device.
        device: Device of the blocks.
        dtype: Dtype of queries, keys and values.
        pattern: Which tokens of a clip see each other.
        backend: ``auto`` or the backend to use.

    Returns:
        The attention. It is ``in_graph`` for ``varlen``, and for ``sdpa`` on a CPU with the full pattern.

    Raises:
        ConfigError: As ``attention``.
    """
    choice = choose_backend(device, dtype, backend, pattern)
    if choice == "varlen":
        boundaries = layout.cu_seqlens
        longest = boundaries[:1].expand(layout.max_seqlen)
        torch._dynamo.mark_dynamic(boundaries, 0)
        torch._dynamo.mark_dynamic(longest, 0)
        of_sizes = partial(_varlen_of_sizes, kernel=_varlen_kernel(choice), boundaries=boundaries, longest=longest)
        return BoundAttention(of_sizes, in_graph=True)
    if choice == "sdpa" and device.type == "cpu" and pattern == FULL:
        torch._dynamo.mark_dynamic(layout.cu_seqlens, 0)
        return BoundAttention(partial(segment_attention, cu_seqlens=layout.cu_seqlens), in_graph=True)
    outside = partial(_outside_of_graphs, layout=layout, keys=layout, pattern=pattern, choice=choice)
    return BoundAttention(outside, in_graph=False)


def _varlen_of_sizes(
    query: Tensor, key: Tensor, value: Tensor, kernel: VarlenKernel, boundaries: Tensor, longest: Tensor
) -> Tensor:
    """``longest`` is an expanded view without storage; its size is the longest segment."""
    most = longest.shape[0]
    return kernel(query, key, value, boundaries, boundaries, most, most)


def _runs(layout: PackLayout, keys: PackLayout) -> list[tuple[tuple[int, int], int]]:
    """(Query length, key length) of each run of adjacent equal segments, and the number of segments in it."""
    lengths = zip(layout.segment_lengths, keys.segment_lengths, strict=True)
    return [(alike, len(list(run))) for alike, run in groupby(lengths)]


def _once(layout: PackLayout, key: tuple[str, AttentionPattern], make: Callable[[], Any]) -> Any:
    if key not in layout.derived:
        layout.derived[key] = make()
    return layout.derived[key]


def _run_masks(layout: PackLayout, pattern: AttentionPattern) -> list[Tensor]:
    """Mask of each run, bool [count, 1, length, length]."""
    runs = [(length, count) for (length, _), count in _runs(layout, layout)]
    parts = token_ranks(layout).split([length * count for length, count in runs])
    ranks = [part.unflatten(0, (count, length)) for part, (length, count) in zip(parts, runs)]
    return [pattern.sees(rank[:, None, :, None], rank[:, None, None, :]) for rank in ranks]


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, keys: PackLayout, pattern: AttentionPattern
) -> Tensor:
    """Each run of segments of equal length becomes a batch: a view, without a copy."""
    runs = _runs(layout, keys)
    masks: Sequence[Tensor | None] = [None] * len(runs)
    if pattern != FULL:
        masks = _once(layout, ("sdpa", pattern), lambda: _run_masks(layout, pattern))
    query_sizes = [length * count for (length, _), count in runs]
    key_sizes = [length * count for (_, length), count in runs]
    outputs = []
    parts = zip(runs, masks, query.split(query_sizes), key.split(key_sizes), value.split(key_sizes))
    for (_, count), mask, *tensors in parts:
        q, k, v = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in tensors)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _block_mask(layout: PackLayout, pattern: AttentionPattern) -> BlockMask:
    """The blocks of token pairs that FlexAttention must compute, and the mask within them.

    ``create_block_mask`` would first build the table of all pairs: 268 MB at 16,384 tokens, and 2 GB for ``window``.
    """
    segment, rank = token_segments(layout), token_ranks(layout)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (segment[query] == segment[key]) & pattern.sees(rank[query], rank[key])

    some, every = visible_blocks(layout, pattern, FLEX_BLOCK_TOKENS)
    (count, columns), (full_count, full_columns) = _in_rows(some & ~every), _in_rows(every)
    return BlockMask.from_kv_blocks(
        count,
        columns,
        full_count,
        full_columns,
        BLOCK_SIZE=FLEX_BLOCK_TOKENS,
        mask_mod=seen,
        seq_lengths=(len(rank), len(rank)),
    )


def _in_rows(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of set blocks per row, int32 ``[1, 1, N]``, and all columns, set ones first, ``[1, 1, N, N]``."""
    table = blocks.to(torch.int32)[None, None]
    return table.sum(-1, dtype=torch.int32), table.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, pattern: AttentionPattern) -> Tensor:
    block_mask = _once(layout, ("flex", pattern), lambda: _block_mask(layout, pattern))
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    with torch.compiler.set_stance("default"):  # also if a sampler forces eager mode: eager flex is dense
        output = _compiled_flex()(q, k, v, block_mask=block_mask)
    return output.squeeze(0).transpose(0, 1)


@lru_cache(maxsize=2)
def _varlen_kernel(choice: str) -> VarlenKernel:
    """The kernel of ``varlen`` or ``flash``, imported once."""
    if choice == "flash":
        return flash.fa2_kernel()
    kernel: VarlenKernel = require("torch.nn.attention.varlen").varlen_attn
    return kernel
