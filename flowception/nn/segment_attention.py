"""Full attention within a pack's segments as one operator that is opaque to ``torch.compile``, for CPUs.

Compiled blocks are shared by all packs of a run, whose segments differ. A traced loop over segments would be recompiled
for every pack; an operator reads them from a tensor instead. On CUDA, torch's ``varlen_attn`` is such an operator. This
is the counterpart for CPUs, where only ``scaled_dot_product_attention`` runs.

Shape legend: ``T`` tokens, ``H`` heads, ``d`` head width, ``S`` segments.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _runs(cu_seqlens: Tensor) -> list[tuple[int, slice]]:
    """Runs of adjacent segments of equal length: the number of segments, and their tokens."""
    runs, at = [], 0
    for length, alike in groupby(stop - start for start, stop in pairwise(cu_seqlens.tolist())):
        count = len(list(alike))
        runs.append((count, slice(at, at + count * length)))
        at += count * length
    return runs


def _batch(tokens: Tensor, count: int) -> Tensor:
    """Tokens ``[count l, H, d]`` of segments as ``[count, H, l, d]``, a view."""
    return tokens.unflatten(0, (count, -1)).transpose(1, 2)


def _tokens(batch: Tensor) -> Tensor:
    return batch.transpose(1, 2).flatten(0, 1)


@torch.library.custom_op("flowception::segment_attention", mutates_args=(), device_types="cpu")
def _segment_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``[T, H, d]`` and log-sum-exp ``[T, H]``."""
    outputs, logsumexps = [], []
    for count, tokens in _runs(cu_seqlens):
        output, logsumexp = _flash_forward(*(_batch(part[tokens], count) for part in (query, key, value)))
        outputs.append(_tokens(output))
        logsumexps.append(_tokens(logsumexp))
    return torch.cat(outputs), torch.cat(logsumexps)


@_segment_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=precision)


@torch.library.custom_op("flowception::segment_attention_backward", mutates_args=(), device_types="cpu")
def _segment_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    runs = []
    for count, tokens in _runs(cu_seqlens):
        parts = (_batch(part[tokens], count) for part in (gradient, query, key, value, output))
        sums = logsumexp[tokens].unflatten(0, (count, -1)).transpose(1, 2)
        runs.append([_tokens(part) for part in _flash_backward(*parts, sums, 0.0, False)])
    of_query, of_key, of_value = (torch.cat(parts) for parts in zip(*runs, strict=True))
    return of_query, of_key, of_value


@_segment_attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_segment_attention_backward(gradient, *ctx.saved_tensors), None)


_segment_attention.register_autograd(_differentiate, setup_context=_keep)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Full attention within each segment on a CPU, by the kernel that ``scaled_dot_product_attention`` uses there.

    Args:
        query: ``[T, H, d]``.
        key: ``[T, H, d]``.
        value: ``[T, H, d]``.
        cu_seqlens: int32 ``[S + 1]``: boundaries of the segments.

    Returns:
        ``[T, H, d]``.
    """
    output, _ = _segment_attention(query, key, value, cu_seqlens)
    return output
