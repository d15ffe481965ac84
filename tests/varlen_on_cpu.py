"""torch's varlen operator on a CPU, so that the way to it can be tested without a GPU: its kernel there, written out.

It refuses what the CUDA kernel refuses: boundaries of queries and keys that differ in number.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen


def _segments(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    if cu_q.numel() != cu_k.numel():
        raise RuntimeError(f"cu_seqlens_k must have shape (batch_size + 1): {cu_q.numel()} and {cu_k.numel()}")
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q.diff().max()) <= max_q
    assert int(cu_k.diff().max()) <= max_k
    return [(slice(*q), slice(*k)) for q, k in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1)


@varlen._varlen_attn.register_kernel("cpu")
def _(query, key, value, cu_q, cu_k, max_q, max_k, *others):
    output = torch.zeros_like(query)
    for own, seen in _segments(cu_q, cu_k, max_q, max_k):
        output[own] = _attend(query[own], key[seen], value[seen])
    sums = torch.zeros(query.shape[1], query.shape[0])
    return output, sums, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _(gradient, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, *others):
    """The softmax's gradient, written out."""
    of_query, of_key, of_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    scale = query.shape[-1] ** -0.5
    for own, seen in _segments(cu_q, cu_k, max_q, max_k):
        q, k, v, g = (part.transpose(0, 1).float() for part in (query[own], key[seen], value[seen], gradient[own]))
        weight = torch.softmax(q @ k.mT * scale, dim=-1)
        of_weight = g @ v.mT
        of_score = weight * (of_weight - (of_weight * weight).sum(-1, keepdim=True)) * scale
        of_query[own] = (of_score @ k).transpose(0, 1).to(query.dtype)
        of_key[seen] = (of_score.mT @ q).transpose(0, 1).to(key.dtype)
        of_value[seen] = (weight.mT @ g).transpose(0, 1).to(value.dtype)
    return of_query, of_key, of_value


def choose_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``auto`` mean varlen for the full pattern, as on CUDA in half precision."""
    monkeypatch.setattr(import_module("flowception.nn.attention"), "choose_backend", lambda *_: "varlen")
