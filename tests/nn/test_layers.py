from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flowception.nn.fused_ops import EAGER
from flowception.nn.init import initialize
from flowception.nn.layers import (
    CountEmbedding,
    Float32Linear,
    RotaryNorm,
    SwiGLU,
    TimeEmbedding,
    waves,
)


def test_rotary_norm_divides_by_the_root_mean_square_and_turns():
    norm = RotaryNorm(2, EAGER)
    norm.weight.data = torch.tensor([1.0, 10.0])
    rms = (12.5 + 1e-6) ** 0.5
    heads, unturned, quarter = (
        torch.tensor([[[3.0, 4.0]]]),
        torch.tensor([[[[1.0, 0.0]]]]),
        torch.tensor([[[[0.0, 1.0]]]]),
    )
    torch.testing.assert_close(norm(heads, unturned), torch.tensor([[[3 / rms, 40 / rms]]]))
    torch.testing.assert_close(norm(heads, quarter), torch.tensor([[[-40 / rms, 3 / rms]]]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_float32_linear_computes_in_float32(weights, inputs, autocast):
    layer = Float32Linear(300, 7, bias_value=2.8)
    initialize(layer, 0)
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
    mlp = SwiGLU(3, 5, EAGER)
    x = torch.randn(4, 3)
    gate, value = mlp.gate_and_value.weight[:5], mlp.gate_and_value.weight[5:]
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ value.T)) @ mlp.output.weight.T)


def test_waves_worked_example():
    values = waves(torch.tensor([0.5]), 1.0, 4.0, 6)
    angles = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(values, torch.cat([angles.sin(), angles.cos()]).unsqueeze(0))


def test_time_embedding_resolves_the_remainder_finely_near_the_end():
    embedding = TimeEmbedding(16)
    initialize(embedding, 0)
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


def test_count_embedding_tells_neighboring_counts_apart():
    embedding = CountEmbedding(16)
    initialize(embedding, 0)
    rank, visible = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    vectors = embedding(rank.flatten(), visible.flatten())
    assert torch.pdist(vectors).min() > 1e-3
