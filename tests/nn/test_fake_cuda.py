"""The network on ``cuda`` without a GPU: one device, no waiting for it, and the numbers of the CPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from flowception.nn import ClipShape, FlowceptionDiT, PackShape
from flowception.nn.attention import attention, bind
from flowception.nn.pattern import AttentionPattern
from flowception.packing.layout import build_layout
from tests.fake_cuda import DEVICE, FakeCuda, content, gradients

CONSTANTS = ["to device: nn/rope.py:VideoRoPE._constants (_to_copy)"] * 2
"""Frequencies and axes of the rotary positions: copied once for a device, before the first step."""
CLIPS = [ClipShape(3, 2, 2, 2), ClipShape(1, 1, 3, 0), ClipShape(4, 2, 1, 1)]
ROOMY = PackShape(token_budget=64, max_frames=12, max_clips=5, max_seqlen=20)


@dataclass
class Case:
    """A network, a pack and how it is run."""

    clips: tuple[ClipShape, ...] = tuple(CLIPS)
    shape: PackShape | None = ROOMY
    precision: str = "bf16"
    """``bf16`` and ``fp32`` weights, or ``autocast`` to bfloat16 over fp32 weights."""
    changes: tuple[tuple[str, object], ...] = ()
    """Of the config."""


def without(*names):
    return tuple((name, 0) for name in names)


NO_TEXT = tuple(clip._replace(text_tokens=0) for clip in CLIPS)
CASES = {
    "weights in bf16": Case(),
    "autocast": Case(precision="autocast"),
    "fp32": Case(precision="fp32"),
    "a tight pack": Case(shape=None),
    "padding alone": Case(clips=()),
    "no text": Case(clips=NO_TEXT),
    "a network without text": Case(clips=NO_TEXT, changes=without("text_dim")),
    "one without classes": Case(changes=without("num_classes")),
    "one without either": Case(clips=NO_TEXT, changes=without("text_dim", "num_classes"), precision="autocast"),
    "without counts and grid": Case(changes=(("count_embedding", False), ("grid_embedding", False))),
    "varlen by name": Case(changes=(("attention_backend", "varlen"),)),
    "sdpa by name": Case(changes=(("attention_backend", "sdpa"),)),
    "causal by sdpa": Case(changes=(("attention_backend", "sdpa"), ("attention_pattern", "causal"))),
    "causal": Case(changes=(("attention_pattern", "causal"),)),
    "window": Case(changes=(("attention_pattern", "window"), ("attention_window_frames", 1)), precision="autocast"),
    "recomputed blocks": Case(changes=(("activation_checkpointing", 1),)),
}


def dense_flex(query, key, value, *, block_mask):
    """FlexAttention as one dense product: applies the mask function, and checks that skipped blocks have no pair."""
    rows = torch.arange(query.shape[2], device=query.device)
    seen = block_mask.mask_mod(None, None, rows[:, None], rows)
    computed = block_mask.to_dense()[0, 0].bool()
    side = block_mask.BLOCK_SIZE[0]
    in_block = computed.repeat_interleave(side, 0, output_size=side * computed.shape[0])
    in_block = in_block.repeat_interleave(side, 1, output_size=side * computed.shape[1])
    seen = seen & in_block[: len(rows), : len(rows)]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


@pytest.fixture(autouse=True)
def _uncompiled_flex(monkeypatch):
    """The kernel compiles only for CUDA; its inputs are checked here."""
    monkeypatch.setattr(import_module("flowception.nn.attention"), "_compiled_flex", lambda: dense_flex)


@pytest.fixture
def network(small_config, randomized) -> Callable[..., FlowceptionDiT]:
    """A network of the case with one block; the same each time."""

    def build(case: Case) -> FlowceptionDiT:
        model = randomized(FlowceptionDiT(replace(small_config, num_layers=1, **dict(case.changes))).initialize(0))
        return model.bfloat16() if case.precision == "bf16" else model

    return build


@pytest.mark.parametrize("name", CASES)
def test_a_forward_stays_on_the_device_and_waits_for_nothing(network, make_pack, name):
    case = CASES[name]
    pack = make_pack(case.clips, shape=case.shape, with_text=("text_dim", 0) not in case.changes)
    model = network(case)
    reference = network(Case(case.clips, case.shape, "fp32", (*case.changes, ("attention_backend", "auto"))))
    with torch.no_grad():
        expected = reference(pack)
    tolerance = 1e-5 if case.precision == "fp32" else 0.05
    with FakeCuda() as cuda:
        cuda.to_cuda(model)
        there = pack.to(DEVICE)
        cuda.crossings.clear()
        # Blocks are recomputed in grad mode alone; no weight asks for a gradient.
        grad_mode = torch.set_grad_enabled(model.config.activation_checkpointing > 0)
        with torch.autocast("cuda", torch.bfloat16, case.precision == "autocast"), grad_mode:
            output = model(there)
        assert cuda.crossings == CONSTANTS
    for ours, expected_part in zip(output, expected, strict=True):
        assert ours.device == DEVICE
        assert ours.dtype == torch.float32
        torch.testing.assert_close(content(ours), expected_part, rtol=tolerance, atol=tolerance)


def test_what_goes_from_part_to_part_under_autocast_is_bfloat16(network, make_pack):
    """The residual stream, which was float32, and what is modulated: CUDA's autocast has norms in float32."""
    model, seen = network(Case(precision="autocast")), {}

    def note(name):
        return lambda _, inputs, output: seen.update({name: (inputs[0].dtype, output.dtype)})

    block = model.blocks[0]
    parts = {"block": block, "attention": block.query_key_value, "attended": block.attention_output, "mlp": block.mlp}
    for name, part in parts.items():
        part.register_forward_hook(note(name))
    with FakeCuda() as cuda, torch.autocast("cuda", torch.bfloat16):
        cuda.to_cuda(model)(make_pack(CLIPS, shape=ROOMY).to(DEVICE))
    assert seen == dict.fromkeys(parts, (torch.bfloat16, torch.bfloat16))


def test_constants_go_to_the_device_once(network, make_pack):
    with FakeCuda() as cuda:
        model = cuda.to_cuda(network(Case()))
        model(make_pack(CLIPS, shape=ROOMY).to(DEVICE))
        there = make_pack(CLIPS[:2], shape=ROOMY).to(DEVICE)
        cuda.crossings.clear()
        model(there)
    assert cuda.crossings == []


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_fewer_queries_than_keys_are_what_the_kernels_take(backend):
    """The kernels need equal numbers of segments on both sides, and the longest of each."""
    whole = build_layout(CLIPS)
    queries = build_layout([clip._replace(frames=1, text_tokens=0) for clip in CLIPS])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(layout.token_kind), 2, 8, generator=generator, dtype=torch.bfloat16)
        for layout in (queries, whole, whole)
    )
    with FakeCuda() as cuda:
        parts = [part.to(DEVICE) for part in (q, k, v)]
        layouts = queries.to(DEVICE), whole.to(DEVICE)
        cuda.crossings.clear()
        output = attention(*parts, layouts[0], backend=backend, key_layout=layouts[1])
        assert cuda.crossings == []
    expected = attention(q.float(), k.float(), v.float(), queries, key_layout=whole)
    torch.testing.assert_close(content(output).float(), expected, rtol=0.03, atol=0.03)


def loss_of(output):
    """A loss that depends on every output of the network."""
    return output.velocity.square().sum() + output.log_rate.square().sum()


BACKWARD = ("weights in bf16", "autocast", "fp32", "padding alone", "a network without text")


@pytest.mark.parametrize("name", BACKWARD)
def test_a_backward_stays_on_the_device_and_waits_for_nothing(network, make_pack, name):
    case = CASES[name]
    pack = make_pack(case.clips, shape=case.shape, with_text=("text_dim", 0) not in case.changes)
    reference = network(replace(case, precision="fp32"))
    expected = torch.autograd.grad(loss_of(reference(pack)), list(reference.parameters()))
    with FakeCuda() as cuda:
        model = cuda.to_cuda(network(case)).requires_grad_()
        there = pack.to(DEVICE)
        with torch.enable_grad():
            with torch.autocast("cuda", torch.bfloat16, case.precision == "autocast"):
                loss = loss_of(model(there))
            cuda.crossings.clear()
            found = gradients(loss, model.parameters())
        assert cuda.crossings == []
    tolerance = 1e-5 if case.precision == "fp32" else 0.05
    for (parameter, weight), ours, plain in zip(model.named_parameters(), found, expected, strict=True):
        assert (ours.device, ours.dtype) == (DEVICE, weight.dtype), parameter
        error, size = (content(ours).float() - plain).norm(), plain.norm()
        assert error <= tolerance * size + 1e-6, (parameter, error, size)


@pytest.mark.parametrize("backend", ["varlen", "sdpa", "causal"])
def test_attention_of_a_compiled_block_waits_for_nothing(backend):
    pattern = AttentionPattern("causal") if backend == "causal" else AttentionPattern()
    dtype = torch.bfloat16 if backend == "varlen" else torch.float32
    layout = build_layout(CLIPS, ROOMY)
    q, k, v = torch.randn(3, ROOMY.token_budget, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with FakeCuda() as cuda:
        parts, there = [part.to(DEVICE) for part in (q, k, v)], layout.to(DEVICE)
        cuda.crossings.clear()
        bound = bind(there, DEVICE, dtype, pattern, "auto")
        output = bound.attend(*parts)
    assert bound.in_graph == (backend == "varlen")
    assert cuda.crossings == []
    expected = attention(q.float(), k.float(), v.float(), layout, pattern)
    tolerance = 0.03 if backend == "varlen" else 1e-5
    torch.testing.assert_close(content(output).float(), expected, rtol=tolerance, atol=tolerance)


def test_a_layout_arrives_whole_and_its_host_copy_stays():
    layout = build_layout(CLIPS, ROOMY)
    layout.derived["mask"] = torch.ones(1)
    with FakeCuda() as cuda:
        there = layout.to(DEVICE, non_blocking=True)
    assert set(cuda.crossings) == {"to device, non_blocking: packing/layout.py:HoldsTensors.to.<lambda> (_to_copy)"}
    assert there.segment_lengths == layout.segment_lengths
    assert all(type(length) is int for length in there.segment_lengths)
    assert there.derived == {}
    for name, value in vars(layout).items():
        if isinstance(value, torch.Tensor):
            moved = getattr(there, name)
            assert (moved.device, moved.dtype) == (DEVICE, value.dtype), name
            assert torch.equal(content(moved), value), name
