"""torch's varlen operator on a CPU, so that the way to it can be tested without a GPU: its kernels, written out.

They refuse what ``flash_api.cpp`` refuses, but for the precision: ``fake_cuda`` asks for half as well.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen


def _segments(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    """Tokens of each segment's queries and keys."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.is_contiguous()
    assert cu_k.is_contiguous()
    assert cu_q.shape == cu_k.shape, f"cu_seqlens of queries {tuple(cu_q.shape)} and of keys {tuple(cu_k.shape)}"
    pairs = list(zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True))
    for (q0, q1), (k0, k1) in pairs:
        assert q0 <= q1 <= q0 + max_q, "a segment is longer than the kernel was told"
        assert k0 <= k1 <= k0 + max_k, "a segment is longer than the kernel was told"
    return [(slice(*q), slice(*k)) for q, k in pairs]


def forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention's results, segment by segment."""
    assert settings[:3] == (False, None, [-1, -1]), "not causal, no custom scale, no window"
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    assert all(part.stride(-1) == 1 for part in (query, key, value)), "the last dimension must be contiguous"
    output = torch.full_like(query, torch.nan)
    for own, seen in _segments(cu_q, cu_k, max_q, max_k):
        q, k, v = (part.transpose(0, 1) for part in (query[own], key[seen], value[seen]))
        output[own] = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
    return output, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values: the softmax's, written out for each segment."""
    of_query, of_key, of_value = (torch.full_like(part, torch.nan) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5
    for own, seen in _segments(cu_q, cu_k, max_q, max_k):
        parts = (query[own], key[seen], value[seen], gradient[own])
        q, k, v, g = (part.float().transpose(0, 1) for part in parts)
        weight = (scale * q @ k.mT).softmax(-1)
        of_weight = g @ v.mT
        of_score = scale * weight * (of_weight - (of_weight * weight).sum(-1, keepdim=True))
        of_query[own] = (of_score @ k).transpose(0, 1)
        of_key[seen] = (of_score.mT @ q).transpose(0, 1)
        of_value[seen] = (weight.mT @ g).transpose(0, 1)
    return of_query, of_key, of_value


varlen._varlen_attn.register_kernel("cpu", forward)
varlen._varlen_attn_backward.register_kernel("cpu", backward)


def choose_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``auto`` mean varlen for the full pattern, as on CUDA in half precision."""
    monkeypatch.setattr(import_module("flowception.nn.attention"), "choose_backend", lambda *_: "varlen")
