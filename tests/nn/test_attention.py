from __future__ import annotations

import logging
import random

import pytest
import torch

from flowception.errors import ConfigError, MissingDependencyError
from flowception.nn import ClipShape, PackShape, attention, build_layout, choose_backend


def layout_of(seed: int):
    """Random clips, some of them alike, and padding behind some packs."""
    draw = random.Random(seed)
    kinds = [ClipShape(draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 3), draw.randint(0, 3)) for _ in "abc"]
    clips = [draw.choice(kinds) for _ in range(draw.randint(1, 7))]
    tight = vars(PackShape.tight(clips))
    return build_layout(clips, PackShape(**{**tight, "token_budget": tight["token_budget"] + draw.choice([0, 37])}))


def dense_reference(query, key, value, layout):
    """One dense softmax over the whole pack, block-diagonal mask, float64."""
    lengths = torch.tensor(layout.segment_lengths)
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(segment[:, None] != segment[None, :], float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.mark.parametrize("seed", range(20))
def test_attention_per_segment_is_dense_attention_behind_a_block_diagonal_mask(seed):
    layout = layout_of(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.shape.token_budget, 2, 8)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    ours, reference = attention(*inputs, layout), dense_reference(*inputs, layout)
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


def test_a_pattern_that_does_not_exist_is_refused():
    layout = build_layout([ClipShape(1, 1, 1)])
    x = torch.randn(2, 1, 8)
    with pytest.raises(ConfigError, match="pattern is 'causal'; only full"):
        attention(x, x, x, layout, pattern="causal")


def test_choice_of_backend():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend(cpu, torch.bfloat16) == "sdpa"
    assert choose_backend(cuda, torch.float32) == "sdpa"
    assert choose_backend(cuda, torch.bfloat16) == "varlen"
    assert choose_backend(cuda, torch.bfloat16, "flash") == "flash"
    assert choose_backend(cuda, torch.bfloat16, "sdpa") == "sdpa"
    with pytest.raises(ConfigError, match="needs CUDA in bfloat16 or float16, this is cpu"):
        choose_backend(cpu, torch.bfloat16, "varlen")
    with pytest.raises(ConfigError, match="choose one of auto, sdpa, varlen, flash"):
        choose_backend(cpu, torch.float32, "xformers")


def test_the_choice_and_its_reason_are_logged_once(caplog):
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            choose_backend(torch.device("cpu"), torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend: sdpa (variable-length kernels do not run on cpu in torch.float32)"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["varlen", "flash"])
@pytest.mark.parametrize("seed", range(4))
def test_cuda_backends_equal_sdpa_per_segment(backend, seed):
    layout = layout_of(seed).to("cuda")
    shape = (layout.shape.token_budget, 2, 64)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    try:
        ours = attention(*inputs, layout, backend=backend)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    reference = attention(*inputs, layout, backend="sdpa")
    torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=5e-2, atol=5e-2)
