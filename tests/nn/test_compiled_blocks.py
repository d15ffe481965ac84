"""Compiled blocks: one graph for all packs of a shape, with and without gradients, and what eager blocks compute.

Most cases trace and differentiate as Inductor would but run the graph's operators one by one, which takes no C++
compiler; the long ones run what Inductor makes.
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor
from flowception.nn import ClipShape, FlowceptionDiT, PackShape, build_layout, dit, segment_attention
from flowception.nn.attention import bind
from flowception.nn.pattern import FULL
from flowception.nn.rows import frame_rows
from flowception.shards.index import ClipIndex
from flowception.training.config import load_config
from tests.nn import varlen_on_cpu
from tests.nn.varlen_on_cpu import choose_varlen
from tests.tracing import TRACED

ROOT = Path(__file__).resolve().parents[2]
SHAPE = PackShape(token_budget=120, max_frames=30, max_clips=30, max_seqlen=60)
PACKS = [
    [ClipShape(2, 2, 2, 3), ClipShape(3, 1, 2, 2)],
    [ClipShape(5, 2, 3, 4)],
    [ClipShape(1, 1, 1)] * 8,
    [],
    [ClipShape(2, 3, 3, 9)] * 3,
]


@pytest.fixture
def compile_with(monkeypatch):
    """Makes torch.compile take a backend, and forgets all that was compiled before and after."""

    def choose(backend):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    def forget():
        torch._dynamo.reset()
        dit.compiled_block.cache_clear()
        counters.clear()

    forget()
    yield choose
    forget()


def compiled_twin(model, **changes):
    twin = FlowceptionDiT(replace(model.config, compile="blocks", **changes)).to(next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def outputs_and_gradients(model, pack, dtype):
    """With gradients and without, of one weighted sum."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        output = model(pack)
        with torch.no_grad():
            alone = model(pack)
    loss = sum((part * torch.sin(torch.arange(part.numel())).view_as(part)).mean() for part in output)
    return [*output, *alone, *torch.autograd.grad(loss, list(model.parameters()))]


def assert_equal(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        scale = other.detach().abs().max().clamp(min=1e-3)
        torch.testing.assert_close(one / scale, other / scale, rtol=0.0, atol=tolerance)


def assert_blocks_equal_eager(model, make_pack, dtype, tolerance, checkpointed):
    if dtype == torch.bfloat16:
        model.bfloat16()
    compiled = compiled_twin(model, activation_checkpointing=checkpointed)
    for seed, clips in enumerate(PACKS):
        pack = make_pack(clips, seed=seed, shape=SHAPE)
        assert_equal(outputs_and_gradients(compiled, pack, dtype), outputs_and_gradients(model, pack, dtype), tolerance)
    assert counters["stats"]["unique_graphs"] == 2, "one for training, one without gradients"
    assert not counters["graph_break"]


@pytest.mark.parametrize("checkpointed", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), ("autocast", 5e-2)])
def test_traced_blocks_equal_eager(model, make_pack, compile_with, dtype, tolerance, checkpointed):
    compile_with(TRACED)
    assert_blocks_equal_eager(model, make_pack, dtype, tolerance, checkpointed)


def test_traced_blocks_over_varlen_equal_eager(model, make_pack, compile_with, monkeypatch):
    """The way of CUDA: boundaries and the longest segment differ from pack to pack in number and size."""
    compile_with(TRACED)
    choose_varlen(monkeypatch)
    assert_blocks_equal_eager(model, make_pack, torch.float32, 1e-5, 0)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on a CPU needs a C++ compiler",
)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "checkpointed", "way"),
    [
        (torch.float32, 1e-5, 1, "segment_attention"),
        ("autocast", 5e-2, 0, "segment_attention"),
        (torch.float32, 1e-5, 0, "varlen"),
    ],
)
def test_blocks_by_inductor_equal_eager(
    model, make_pack, compile_with, monkeypatch, dtype, tolerance, checkpointed, way
):
    if way == "varlen":
        choose_varlen(monkeypatch)
    assert_blocks_equal_eager(model, make_pack, dtype, tolerance, checkpointed)


@pytest.mark.parametrize("pattern", ["causal", "window"])
def test_another_pattern_interrupts_the_graph_and_changes_nothing(model, make_pack, compile_with, pattern):
    compile_with(TRACED)
    model.config.attention_pattern, model.config.attention_window_frames = pattern, 1 if pattern == "window" else None
    eager = FlowceptionDiT(replace(model.config))
    eager.load_state_dict(model.state_dict())
    compiled = compiled_twin(eager)
    graphs = set()
    for seed, clips in enumerate(PACKS[:3]):
        pack = make_pack(clips, seed=seed, shape=SHAPE)
        ours, theirs = (outputs_and_gradients(network, pack, torch.float32) for network in (compiled, eager))
        assert_equal(ours, theirs, 1e-5)
        graphs.add(counters["stats"]["unique_graphs"])
    assert counters["graph_break"]
    assert len(graphs) == 1, "the next packs need no other graphs than the first"


def test_all_blocks_and_packs_of_another_shape_need_few_graphs(model, make_pack, compile_with):
    """Where a second shape comes, as in another run of the process, sizes become symbols."""
    compile_with(TRACED)
    compiled = compiled_twin(model)
    for number in range(4):
        shape = replace(SHAPE, token_budget=120 + 20 * number)
        compiled(make_pack(PACKS[0], shape=shape))
    assert counters["stats"]["unique_graphs"] == 2


def recipe():
    """The 2b recipe's configuration at a small width."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "in_channels": 4, "text_dim": 4}
    words = [f"model.{name}={value}" for name, value in sizes.items()]
    config = load_config([ROOT / "configs/t2v_2b.yaml"], ["run_dir=x", "data.path=x", *words])
    return config, replace(config.model, compile="blocks", activation_checkpointing=0)


@pytest.fixture(scope="module")
def recipe_layouts():
    """Of the first 1,000 packs of the recipe's plan, over clips of its size but of many lengths and captions."""
    config, model = recipe()
    clips = np.arange(20_000)
    index = ClipIndex.from_arrays(frames=5 + clips % 15, height=8, width=8, text_tokens=clips % 129)
    plan = Plan(index, None, config.process, config.plan, model.spec(), seed=0, null_text_tokens=1)
    cursor, layouts = Cursor(), []
    while len(layouts) < 1000:
        for pack in plan.step(cursor).packs:
            draws = plan.clip_draws(pack)
            visible, text = draws.clips.visible_frames.tolist(), draws.text_tokens.tolist()
            shapes = [ClipShape(frames, 8, 8, tokens) for frames, tokens in zip(visible, text, strict=True)]
            layouts.append(build_layout(shapes, plan.pack_shape))
        cursor = plan.next(cursor)
    return layouts[:1000]


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", ["segment_attention", "varlen"])
def test_a_thousand_packs_of_the_recipe_need_no_other_graph(recipe_layouts, compile_with, monkeypatch, way):
    """Real static shapes at a small width; the kernels compute nothing, as only what is compiled is in question."""
    compile_with(TRACED)
    if way == "varlen":
        choose_varlen(monkeypatch)
        monkeypatch.setattr(varlen_on_cpu, "_segments", lambda *_: [])
    monkeypatch.setattr(segment_attention, "_flash_forward", lambda q, *_: (torch.zeros_like(q), q.sum(-1)))
    monkeypatch.setattr(segment_attention, "_flash_backward", lambda _, *tensors: tensors[:3])
    _, sizes = recipe()
    model, segments, longest = FlowceptionDiT(sizes).initialize(0), set(), set()
    for number, layout in enumerate(recipe_layouts if way == "varlen" else recipe_layouts[::4]):
        tokens = torch.zeros(len(layout.token_kind), 16, requires_grad=True)
        conditions = torch.zeros(len(layout.frame_clip), 16), torch.zeros(len(layout.clip_frames), 16)
        rows, rotations = frame_rows(layout, with_text=True), model.rope.rotations(layout)
        bound = bind(layout, tokens.device, tokens.dtype, FULL, "auto")
        with torch.set_grad_enabled(number % 10 != 0):
            output = model.blocks[0](tokens, *conditions, rows, rotations, bound)
        if number % 10 == 1:
            output.mean().backward()
        segments.add(len(layout.segment_lengths))
        longest.add(layout.max_seqlen)
    assert min(len(segments), len(longest)) > 5, "packs that are alike prove nothing"
    assert counters["stats"]["unique_graphs"] == 2, "one for training, one without gradients"
    assert not counters["graph_break"]
