"""Attention: every clip of a pack attends to itself, by the pattern, and to nothing else.

Backends, all equal up to rounding:

* ``sdpa``: ``scaled_dot_product_attention`` segment by segment, every pattern. The reference, and the way on a CPU;
  neighboring segments of equal length go through one call. A pattern other than ``full`` is a boolean mask inside the
  segment, which saves nothing.
* ``flex``: FlexAttention, every pattern, CUDA (on a CPU it has no backward). Blocks of pairs that the pattern leaves
  out are skipped.
* ``varlen``: ``torch.nn.attention.varlen``, ``full`` only, CUDA in half precision. FlashAttention-2 is built into
  torch; where the package of FlashAttention-3 is installed on a Hopper GPU, torch is told to use that.
* ``flash``: the kernels of an installed flash-attn package, ``full`` only, CUDA in half precision: version 3 is
  ``varlen``, version 2 its own ``flash_attn_varlen_func``. Its window is of tokens, not of frames.

Masks are made once for each pack and kept in its layout.

A compiled block takes its attention from ``bind``: the backend is chosen outside of it, and what differs from pack to
pack reaches it as contents of tensors, or as sizes that are marked as varying.

Shape legend: ``T`` tokens of the pack, ``H`` heads, ``d`` width of a head, ``S`` segments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, Literal, NamedTuple, Protocol

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

AttentionBackend = Literal["auto", "sdpa", "flex", "varlen", "flash"]
BACKENDS = ("auto", "sdpa", "flex", "varlen", "flash")
FLEX_BLOCK_TOKENS = 128
"""Side of a block of FlexAttention's, its own default."""
_FULL_ONLY = ("varlen", "flash")
_HALF = (torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


class BoundAttention(NamedTuple):
    """Attention within the segments of one pack."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Queries, keys and values ``[T, H, d]`` to ``[T, H, d]``."""
    in_graph: bool
    """Whether a compiled block may hold it; else it interrupts the block's graph."""


class Attend(Protocol):
    """Attention of a network: queries, keys and values ``[T, H, d]`` and the layout, giving ``[T, H, d]``."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
        """Attend within each segment."""


def check_backend(requested: str, pattern: AttentionPattern) -> None:
    """Refuse a backend that does not exist or lacks the pattern.

    Raises:
        ConfigError: Saying which backends can.
    """
    one_of(BACKENDS).check("model.attention_backend", requested)
    if requested in _FULL_ONLY and pattern != FULL:
        raise ConfigError(
            f"attention_backend={requested} supports only attention_pattern=full, got {pattern.name}; use "
            "attention_backend=auto, or sdpa or flex (CUDA), which support every pattern"
        )


@lru_cache(maxsize=32)
def choose_backend(
    device: torch.device, dtype: torch.dtype, requested: str = "auto", pattern: AttentionPattern = FULL
) -> str:
    """Choose the backend for a device, dtype and pattern; the choice and its reason are logged once.

    Args:
        device: Where the tensors are.
        dtype: Their dtype.
        requested: ``auto``, or a backend that must be used.
        pattern: Which tokens see each other.

    Returns:
        ``sdpa``, ``flex``, ``varlen`` or ``flash``; of ``flash`` with FlashAttention-3, ``varlen``.

    Raises:
        ConfigError: If the requested backend is unknown, cannot run there or lacks the pattern.
    """
    check_backend(requested, pattern)
    half_on_cuda = device.type == "cuda" and dtype in _HALF
    if requested in _FULL_ONLY and not half_on_cuda:
        raise ConfigError(
            f"attention_backend={requested} needs CUDA in bfloat16 or float16, got {device.type} in {dtype}; "
            "use attention_backend=auto"
        )
    if requested == "flex" and device.type != "cuda":
        raise ConfigError(
            f"attention_backend=flex needs CUDA, got {device.type}, where FlexAttention has no backward; "
            "use attention_backend=auto"
        )
    if requested in _FULL_ONLY or (requested == "auto" and half_on_cuda and pattern == FULL):
        fa3 = flash.activate_fa3()
        choice = "flash" if requested == "flash" and not fa3 else "varlen"
        fa2 = "FlashAttention-2 " + ("of the flash-attn package" if choice == "flash" else "built into torch")
        reason = "FlashAttention-3 is installed" if fa3 else fa2
    elif requested != "auto":
        choice, reason = requested, f"requested by attention_backend={requested}"
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
    """Attention inside each segment of a pack.

    Args:
        query: ``[T, H, d]``.
        key: ``[T, H, d]``, or as many tokens as ``key_layout`` has.
        value: As ``key``.
        layout: Where the segments are.
        pattern: Which tokens of a clip see each other.
        backend: ``auto`` or the backend to use.
        key_layout: Where the segments of keys and values are, where they are other tokens than the queries: segment i
            of the queries attends to segment i of these (by ``sdpa`` where ``flex`` was asked for). None for the same
            tokens.

    Returns:
        ``[T, H, d]``.

    Raises:
        ConfigError: If the backend is unknown, cannot run here or lacks the pattern, or the keys are other tokens than
            the queries and the pattern is not full.
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
"""The same where a compiled block calls it: its graph ends before and another begins behind."""


def bind(
    layout: PackLayout, device: torch.device, dtype: torch.dtype, pattern: AttentionPattern, backend: str
) -> BoundAttention:
    """Attention of one pack for compiled blocks, compiled once for all packs of a shape.

    How many segments a pack has and how long the longest is differ from pack to pack. They are sizes of tensors that
    are marked as varying: ``mark_dynamic`` makes the compiler fail where it would fix one of them.

    Args:
        layout: Of the pack, on its device.
        device: Where the blocks compute.
        dtype: Of queries, keys and values.
        pattern: Which tokens of a clip see each other.
        backend: ``auto`` or the backend to use.

    Returns:
        The attention. It is ``in_graph`` by ``varlen``, and by ``sdpa`` on a CPU with the full pattern.

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
    """The longest segment is the size of ``longest``, a view that holds nothing of its own."""
    most = longest.shape[0]
    return kernel(query, key, value, boundaries, boundaries, most, most)


def _runs(layout: PackLayout, keys: PackLayout) -> list[tuple[tuple[int, int], int]]:
    """Query and key lengths of neighboring segments that are alike in both, and how many they are."""
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
    """Runs of equally long segments become a batch: a view, nothing is copied."""
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
    """Which blocks of token pairs FlexAttention must compute, and which pairs of those count.

    ``create_block_mask`` would first make the table of all pairs: 268 MB at 16,384 tokens, and 2 GB for ``window``.
    """
    segment, rank = token_segments(layout), token_ranks(layout)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (segment[query] == segment[key]) & pattern.sees(rank[query], rank[key])

    some, every = visible_blocks(layout, pattern, FLEX_BLOCK_TOKENS)
    (number, places), (whole_number, whole_places) = _in_rows(some & ~every), _in_rows(every)
    return BlockMask.from_kv_blocks(
        number,
        places,
        whole_number,
        whole_places,
        BLOCK_SIZE=FLEX_BLOCK_TOKENS,
        mask_mod=seen,
        seq_lengths=(len(rank), len(rank)),
    )


def _in_rows(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, int32 ``[1, 1, N]``, and every column, theirs first, ``[1, 1, N, N]``."""
    table = blocks.to(torch.int32)[None, None]
    return table.sum(-1, dtype=torch.int32), table.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, pattern: AttentionPattern) -> Tensor:
    block_mask = _once(layout, ("flex", pattern), lambda: _block_mask(layout, pattern))
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    with torch.compiler.set_stance("default"):  # also where a sampler lets all else be eager: eager flex is dense
        output = _compiled_flex()(q, k, v, block_mask=block_mask)
    return output.squeeze(0).transpose(0, 1)


@lru_cache(maxsize=2)
def _varlen_kernel(choice: str) -> VarlenKernel:
    """The function behind ``varlen`` or ``flash``, found and imported once."""
    if choice == "flash":
        return flash.fa2_kernel()
    kernel: VarlenKernel = require("torch.nn.attention.varlen").varlen_attn
    return kernel
