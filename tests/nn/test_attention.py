from __future__ import annotations

import logging
import random
from importlib import import_module

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from flowception.errors import ConfigError, MissingDependencyError
from flowception.nn import (
    AttentionPattern,
    ClipShape,
    DiTConfig,
    PackShape,
    TokenKind,
    attention,
    build_layout,
    choose_backend,
)

EVERY_PATTERN = [
    AttentionPattern(),
    AttentionPattern("causal"),
    AttentionPattern("window", 1),
    AttentionPattern("window", 2),
]


def layout_of(seed: int):
    """Random clips, some of them alike, and padding behind some packs."""
    draw = random.Random(seed)
    kinds = [ClipShape(draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 3), draw.randint(0, 3)) for _ in "abc"]
    clips = [draw.choice(kinds) for _ in range(draw.randint(1, 7))]
    tight = vars(PackShape.tight(clips))
    return build_layout(clips, PackShape(**{**tight, "token_budget": tight["token_budget"] + draw.choice([0, 37])}))


def allowed(layout, pattern):
    """Who sees whom, pair by pair in plain words, bool [T, T]."""
    segment = [number for number, length in enumerate(layout.segment_lengths) for _ in range(length)]
    kind, slot = layout.token_kind.tolist(), layout.token_frame.tolist()
    rank = [layout.frame_rank[slot[t]].item() for t in range(len(kind))]
    seen = torch.zeros(len(kind), len(kind), dtype=torch.bool)
    for q in range(len(kind)):
        for k in range(len(kind)):
            if segment[q] != segment[k]:
                continue
            if pattern.name == "full" or kind[q] == TokenKind.PADDING or kind[k] == TokenKind.TEXT:
                seen[q, k] = True
            elif kind[q] == TokenKind.TEXT:
                seen[q, k] = False
            elif pattern.name == "causal":
                seen[q, k] = rank[k] <= rank[q]
            else:
                seen[q, k] = abs(rank[k] - rank[q]) <= pattern.window_frames
    return seen


def dense_reference(query, key, value, layout, pattern):
    """One dense softmax over the whole pack behind a mask, float64."""
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed(layout, pattern), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_attention_per_segment_is_dense_attention_behind_a_mask(seed, pattern):
    layout = layout_of(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.shape.token_budget, 2, 8)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    ours, reference = attention(*inputs, layout, pattern), dense_reference(*inputs, layout, pattern)
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_fewer_queries_than_keys_are_those_rows_of_the_whole(seed):
    """A random part of each clip's frames asks; keys and values are the whole clip's."""
    draw = random.Random(seed)
    clips = [ClipShape(draw.randint(1, 5), 2, draw.randint(1, 3), draw.randint(0, 3)) for _ in range(6)]
    asking = [ClipShape(draw.randint(1, clip.frames), clip.height, clip.width) for clip in clips]
    whole, queries = build_layout(clips), build_layout(asking)
    ends = torch.tensor(whole.segment_lengths).cumsum(0)
    rows = torch.cat([torch.arange(int(end) - clip.tokens, int(end)) for end, clip in zip(ends, asking, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(whole.token_kind), 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    ours = attention(q[rows], k, v, queries, key_layout=whole)
    torch.testing.assert_close(ours, dense_reference(q, k, v, whole, EVERY_PATTERN[0])[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fewer_queries_than_keys_on_a_gpu():
    clips = [ClipShape(4, 2, 2, 3), ClipShape(2, 3, 2)]
    whole, queries = build_layout(clips).to("cuda"), build_layout([ClipShape(1, 2, 2), ClipShape(2, 3, 2)]).to("cuda")
    rows = torch.cat([torch.arange(18, 23), torch.arange(23, 37)]).cuda()
    q, k, v = (torch.randn(37, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    varlen, sdpa = (attention(q[rows], k, v, queries, key_layout=whole, backend=b) for b in ("varlen", "sdpa"))
    torch.testing.assert_close(varlen, sdpa, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("pattern", EVERY_PATTERN[1:], ids=str)
def test_fewer_queries_than_keys_need_the_full_pattern(pattern):
    layout = build_layout([ClipShape(1, 1, 1)])
    x = torch.randn(2, 1, 8)
    with pytest.raises(ConfigError, match=f"attention_pattern must be full when keys .*, got {pattern.name}"):
        attention(x, x, x, layout, pattern, key_layout=layout)


@pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)
def test_flex_sees_what_the_pattern_says(pattern, monkeypatch):
    """Its mask and its forward, uncompiled; the kernel itself needs CUDA."""
    module = import_module("flowception.nn.attention")  # the package's own name for it is the function
    monkeypatch.setattr(module, "_compiled_flex", lambda: flex_attention)
    for seed in (0, 3):
        layout = layout_of(seed)
        inputs = torch.randn(3, layout.shape.token_budget, 2, 16, generator=torch.Generator().manual_seed(seed))
        expected = dense_reference(*inputs, layout, pattern)
        torch.testing.assert_close(module._flex(*inputs, layout, pattern), expected, rtol=1e-4, atol=1e-5)


def large_layout(seed):
    """Some blocks of 128 tokens lie inside a frame, some hold many clips; text, padding and a last block cut short."""
    draw = random.Random(seed)
    kinds = [(2, 12, 15, 3), (5, 2, 3, 150), (9, 5, 5, 0), (1, 1, 1, 2), (3, 3, 4, 0)]
    clips = [ClipShape(2, 16, 16, 5), *(ClipShape(*draw.choice(kinds)) for _ in range(4))]
    tight = vars(PackShape.tight(clips))
    return build_layout(
        clips, PackShape(**{**tight, "token_budget": tight["token_budget"] + draw.choice([0, 200, 77])})
    )


@pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_blocks_of_the_flex_mask_are_those_of_the_dense_mask(pattern, seed):
    """Blocks with a pair, and blocks of pairs that all count, which skip the mask; also as torch itself counts them."""
    module = import_module("flowception.nn.attention")
    layout = large_layout(seed)
    mask, side = module._block_mask(layout, pattern), module.FLEX_BLOCK_TOKENS
    places = torch.arange(layout.shape.token_budget)
    dense = mask.mask_mod(None, None, places[:, None], places)
    missing = -len(dense) % side
    blocks = torch.nn.functional.pad(dense, (0, missing, 0, missing)).unflatten(1, (-1, side)).unflatten(0, (-1, side))
    some, every = blocks.any(3).any(1), blocks.all(3).all(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)
    assert torch.equal(mask.full_kv_num_blocks[0, 0], every.sum(1))
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() == some.sum()
    assert every.any()
    for row, (number, columns) in enumerate(
        zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
    ):
        assert columns[:number].tolist() == every[row].nonzero().flatten().tolist()
    theirs = create_block_mask(mask.mask_mod, None, None, len(dense), len(dense), device="cpu")
    assert mask.shape == theirs.shape
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(mask, name), getattr(theirs, name)), name


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize("pattern", EVERY_PATTERN[1:], ids=str)
def test_no_table_of_all_pairs_is_made_for_the_flex_mask(pattern):
    layout = build_layout([ClipShape(19, 8, 8, 20)] * 5)
    with Largest() as largest:
        import_module("flowception.nn.attention")._block_mask(layout, pattern)
    tokens = layout.shape.token_budget
    assert tokens > 6000
    assert largest.elements < tokens**2 / 100


@pytest.mark.parametrize("pattern", EVERY_PATTERN[1:], ids=str)
def test_a_mask_is_made_once_for_a_pack_and_not_carried_to_another(pattern, monkeypatch):
    made, sees = [], AttentionPattern.sees
    monkeypatch.setattr(AttentionPattern, "sees", lambda *arguments: made.append(1) or sees(*arguments))
    layout = build_layout([ClipShape(3, 1, 2), ClipShape(2, 1, 2)])
    x = torch.randn(layout.shape.token_budget, 1, 8)
    for _ in range(3):
        attention(x, x, x, layout, pattern)
    assert len(made) == 2  # one for each run of equally long segments
    assert not layout.to("cpu").derived


@pytest.mark.parametrize(
    ("name", "window", "message"),
    [
        ("diagonal", None, "model.attention_pattern must be one of full, causal, window, got 'diagonal'"),
        ("window", None, r"attention_window_frames must be an integer >= 1 \(attention_pattern is window\), got null"),
        ("window", 0, "attention_window_frames must be .*, got 0"),
        ("causal", 2, "attention_window_frames must be null unless .*, got 2 and causal"),
    ],
)
def test_a_pattern_that_does_not_exist_is_rejected(name, window, message):
    with pytest.raises(ConfigError, match=message):
        AttentionPattern(name, window)


def test_choice_of_backend():
    cpu, cuda, causal = torch.device("cpu"), torch.device("cuda"), AttentionPattern("causal")
    assert choose_backend(cpu, torch.bfloat16) == "sdpa"
    assert choose_backend(cuda, torch.float32) == "sdpa"
    assert choose_backend(cuda, torch.bfloat16) == "varlen"
    assert choose_backend(cuda, torch.bfloat16, "flash") == "flash"
    assert choose_backend(cuda, torch.bfloat16, "sdpa") == "sdpa"
    assert choose_backend(cuda, torch.bfloat16, "flex") == "flex"
    assert choose_backend(cuda, torch.bfloat16, "auto", causal) == "flex"
    assert choose_backend(cuda, torch.float32, "auto", AttentionPattern("window", 2)) == "flex"
    assert choose_backend(cpu, torch.float32, "auto", causal) == "sdpa"
    assert choose_backend(cuda, torch.bfloat16, "sdpa", causal) == "sdpa"
    with pytest.raises(ConfigError, match="needs CUDA in bfloat16 or float16, got cpu"):
        choose_backend(cpu, torch.bfloat16, "varlen")
    with pytest.raises(ConfigError, match="flex needs CUDA, got cpu, where FlexAttention has no backward"):
        choose_backend(cpu, torch.float32, "flex", causal)
    with pytest.raises(ConfigError, match="must be one of auto, sdpa, flex, varlen, flash, got 'xformers'"):
        choose_backend(cpu, torch.float32, "xformers")


@pytest.mark.parametrize("backend", ["varlen", "flash"])
@pytest.mark.parametrize("pattern", [("causal", None), ("window", 3)])
def test_a_backend_without_the_pattern_says_which_have_it(backend, pattern):
    message = f"{backend} supports only .*=full, got {pattern[0]}; use .*sdpa or flex .CUDA., which support"
    with pytest.raises(ConfigError, match=message):
        choose_backend(torch.device("cuda"), torch.bfloat16, backend, AttentionPattern(*pattern))
    keys = {"attention_pattern": pattern[0], "attention_window_frames": pattern[1]}
    with pytest.raises(ConfigError, match=message):
        DiTConfig(attention_backend=backend, **keys)


def test_the_choice_and_its_reason_are_logged_once(caplog):
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            choose_backend(torch.device("cpu"), torch.float32)
            choose_backend(torch.device("cuda"), torch.bfloat16, "auto", AttentionPattern("causal"))
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend: sdpa (variable-length kernels do not run on cpu in torch.float32)",
        "attention backend: flex (the kernel for attention_pattern=causal on CUDA)",
    ]


def test_flex_is_compiled_also_where_a_sampler_lets_all_else_be_eager(monkeypatch):
    """Eager, FlexAttention would make the table of all pairs. A stand-in is compiled, by a backend that counts."""
    module, graphs = import_module("flowception.nn.attention"), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda query, key, value, block_mask: query + 1, backend=backend)
    monkeypatch.setattr(module, "_compiled_flex", lambda: compiled)
    layout = build_layout([ClipShape(2, 2, 2)])
    tokens = torch.zeros(len(layout.token_kind), 2, 8)
    with torch.compiler.set_stance("force_eager"):
        output = module._flex(tokens, tokens, tokens, layout, AttentionPattern("causal"))
    assert len(graphs) == 1
    assert torch.equal(output, tokens + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_flex_equals_sdpa_per_segment_on_cuda(dtype, pattern, seed):
    layout = layout_of(seed).to("cuda")
    shape = (layout.shape.token_budget, 2, 64)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    ours = attention(*inputs, layout, pattern, backend="flex")
    reference = attention(*inputs, layout, pattern, backend="sdpa")
    torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=5e-2, atol=5e-2)


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
