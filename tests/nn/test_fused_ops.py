from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from flowception.nn import FlowceptionDiT
from flowception.nn.fused_ops import EAGER, add_gated, compiled_ops, modulate
from flowception.nn.rows import Rows


def test_add_gated_gives_each_token_its_row_of_gates():
    x, update, gate, row = torch.randn(4, 3), torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 1, 1])
    rows = Rows(row, torch.tensor([0, 1, 4]), torch.tensor([0, 1]))
    torch.testing.assert_close(add_gated(x, update, gate, rows), x + gate[row] * update)


def test_modulate_without_shift_and_scale_is_the_norm_and_each_token_takes_its_row():
    x, row = torch.randn(5, 4), torch.tensor([0, 0, 1, 1, 1])
    rows = Rows(row, torch.tensor([0, 2, 5]), torch.tensor([0, 1]))
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    zero = torch.zeros(2, 4)
    torch.testing.assert_close(modulate(x, zero, zero, rows), normed)
    shift, scale = torch.randn(2, 2, 4)
    torch.testing.assert_close(modulate(x, shift, scale, rows), normed * (1 + scale[row]) + shift[row])


needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on a CPU needs a C++ compiler",
)


def outputs_and_gradients(model, packs, dtype):
    """Of one weighted sum over the packs, one forward each."""
    loss, outputs = 0.0, []
    for pack in packs:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
            output = model(pack)
        outputs += [part.detach() for part in output]
        loss = loss + sum((part * torch.sin(torch.arange(part.numel())).view_as(part)).mean() for part in output)
    return outputs, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.long
@pytest.mark.timeout(1200)
@needs_a_compiler
@pytest.mark.parametrize(
    ("dtype", "tolerance", "activation_checkpointing"),
    [(torch.float32, 1e-5, False), (torch.bfloat16, 5e-2, True), ("autocast", 5e-2, False)],
    ids=str,
)
def test_compiled_ops_equal_eager(model, mixed_clips, make_pack, dtype, tolerance, activation_checkpointing):
    """Packs of several shapes, so that sizes become symbols too."""
    if dtype == torch.bfloat16:
        model.bfloat16()
    model.config.activation_checkpointing = activation_checkpointing
    compiled = FlowceptionDiT(replace(model.config, compile="leaves")).to(next(model.parameters()).dtype)
    compiled.load_state_dict(model.state_dict())
    assert compiled.blocks[0].ops == compiled_ops() != EAGER
    packs = [make_pack(mixed_clips), make_pack(mixed_clips[:3], seed=1), make_pack(mixed_clips[2:5], seed=2)]
    eager_out, eager_gradients = outputs_and_gradients(model, packs, dtype)
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        out, gradients = outputs_and_gradients(compiled, packs, dtype)
    assert not counters["graph_break"]
    assert not counters["unimplemented"]
    for ours, theirs in zip([*out, *gradients], [*eager_out, *eager_gradients], strict=True):
        scale = theirs.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0.0, atol=tolerance)
