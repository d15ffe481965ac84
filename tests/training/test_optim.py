import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowception.errors import ConfigError
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.ema import EmaConfig, decay_at
from flowception.training.optim import OptimConfig, build_optimizer, learning_rate

CPU = torch.device("cpu")


def test_warm_up_then_constant():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_decay_starts_at_lr_and_ends_at_the_last_step(schedule, middle):
    config = OptimConfig(lr=1.0, warmup_steps=10, lr_schedule=schedule, lr_end_ratio=0.1)
    assert learning_rate(config, 9, 111) == learning_rate(config, 10, 111) == 1.0
    assert learning_rate(config, 60, 111) == pytest.approx(middle)
    assert learning_rate(config, 110, 111) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert learning_rate(config, 500, 111) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_cosine_is_a_cosine():
    config = OptimConfig(lr=2.0, warmup_steps=0, lr_schedule="cosine", lr_end_ratio=0.0)
    assert learning_rate(config, 25, 101) == pytest.approx(1 + math.cos(math.pi / 4))


def test_only_matrices_other_than_embeddings_decay():
    model = nn.ModuleDict({"table": nn.Embedding(3, 4), "linear": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    decaying, plain = build_optimizer(model, OptimConfig(weight_decay=0.3), CPU).param_groups
    assert [p is model["linear"].weight for p in decaying["params"]] == [True]
    assert len(plain["params"]) == 4
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)


def test_the_optimizer_is_fused_if_the_run_is_on_cuda():
    model = nn.Linear(4, 2)
    assert build_optimizer(model, OptimConfig(), torch.device("cuda", 0)).defaults["fused"]
    assert not build_optimizer(model, OptimConfig(), CPU).defaults["fused"]


def test_partitioned_weights_are_grouped_by_their_full_shape():
    model = nn.Linear(4, 2)
    model.weight.ds_shape, model.bias.ds_shape = model.weight.shape, model.bias.shape
    model.weight.data = torch.empty(0)
    decaying, plain = build_optimizer(model, OptimConfig(), CPU).param_groups
    assert decaying["params"][0] is model.weight
    assert plain["params"][0] is model.bias


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"eps": 0},
        {"warmup_steps": -1},
        {"lr_schedule": "step"},
        {"lr_end_ratio": 2},
        {"clip_grad_norm": 0},
        {"weight_decay": -1},
    ],
)
def test_values_out_of_range_are_errors_that_name_the_key(wrong):
    with pytest.raises(ConfigError, match=f"optim.{next(iter(wrong))}"):
        OptimConfig(**wrong)


def test_ema_decay_grows_and_update_is_the_formula():
    config = EmaConfig(decay=0.99, warmup_updates=10)
    assert [decay_at(config, step) for step in (0, 1, 10)] == [0.1, 2 / 11, 11 / 20]
    assert decay_at(config, 10_000) == 0.99
    assert decay_at(EmaConfig(decay=0.5, warmup_updates=1), 0) == 0.5
    ema, weight = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 6.0])]
    ShardedState.update_ema(SimpleNamespace(ema=ema, masters=weight), 0.75)
    assert ema[0].tolist() == [1.5, 3.0]
    with pytest.raises(ConfigError, match="ema.decay"):
        EmaConfig(decay=1.0)
