from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flowception.nn.initialise import initialise
from flowception.nn.layers import (
    CountEmbedding,
    Float32Linear,
    RMSNorm,
    SwiGLU,
    TimeEmbedding,
    modulate,
    take_rows,
    waves,
)


def test_rms_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(2)
    norm.weight.data = torch.tensor([1.0, 10.0])
    rms = (12.5 + 1e-6) ** 0.5
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3 / rms, 40 / rms]]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_float32_linear_computes_in_float32(weights, inputs, autocast):
    layer = Float32Linear(300, 7, bias_value=2.8)
    initialise(layer, 0)
    layer.to(weights)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = layer(x)
    assert out.dtype == torch.float32
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert layer.weight.grad.dtype == weights
    torch.testing.assert_close(layer.bias.grad.float(), torch.full((7,), 5.0))


def test_swiglu_is_its_formula():
    mlp = SwiGLU(3, 5)
    x = torch.randn(4, 3)
    gate, value = mlp.gate_and_value.weight[:5], mlp.gate_and_value.weight[5:]
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ value.T)) @ mlp.output.weight.T)


def test_modulate_without_shift_and_scale_is_the_norm_and_each_token_takes_its_row():
    x, row = torch.randn(5, 4), torch.tensor([1, 0, 0, 1, 1])
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    zero = torch.zeros(2, 4)
    torch.testing.assert_close(modulate(x, zero, zero, row), normed)
    shift, scale = torch.randn(2, 2, 4)
    torch.testing.assert_close(modulate(x, shift, scale, row), normed * (1 + scale[row]) + shift[row])


def test_gradient_of_take_rows_is_that_of_indexing():
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    row = torch.tensor([2, 0, 2, 2, 1])
    weight = torch.randn(5, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad((take_rows(table, row) * weight).sum(), table)
    (expected,) = torch.autograd.grad((table[row] * weight).sum(), table)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert ours[3].eq(0).all()


class Additions(TorchDispatchMode):
    """Notes the dtype of every sum by index (a CPU is exact in bfloat16 too, a GPU's atomic sum stops at 256)."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index_add_.default:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_gradient_of_take_rows_is_added_up_in_float32():
    table = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = take_rows(table, torch.zeros(1000, dtype=torch.int64))
    with Additions() as additions:
        (gradient,) = torch.autograd.grad(rows.sum(), table)
    assert additions.dtypes == [torch.float32]
    assert gradient.dtype == torch.bfloat16
    assert gradient.item() == 1000.0


def test_waves_by_hand():
    values = waves(torch.tensor([0.5]), 1.0, 4.0, 6)
    angles = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(values, torch.cat([angles.sin(), angles.cos()]).unsqueeze(0))


def test_time_embedding_resolves_the_remainder_finely_near_the_end():
    embedding = TimeEmbedding(16)
    initialise(embedding, 0)
    seen = []
    embedding.mlp.hidden.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    times = torch.tensor([0.50, 0.51, 0.98, 0.99, 1.0])
    out = embedding(times)
    assert out.shape == (5, 16)
    remainder = seen[0][:, 128:]
    steps = (remainder[1:] - remainder[:-1]).norm(dim=1)
    assert steps[2] > 5 * steps[0]
    assert steps[3] > 5 * steps[0]
    assert torch.isfinite(out).all()


def test_count_embedding_tells_neighbouring_counts_apart():
    embedding = CountEmbedding(16)
    initialise(embedding, 0)
    rank, visible = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    vectors = embedding(rank.flatten(), visible.flatten())
    assert torch.pdist(vectors).min() > 1e-3
