from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from flowception.nn import DiTConfig, FlowceptionDiT
from flowception.nn.init import initialize

ZERO = ("frame_modulation.weight", "text_modulation.weight", "heads.velocity.weight", "heads.rate.weight")


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_gates_and_output_heads_are_zero_and_nothing_else_is(small_config):
    for name, value in state(FlowceptionDiT(small_config).initialize(0)).items():
        must_be_zero = name.endswith(ZERO) or (name.endswith("bias") and not name.endswith("rate.bias"))
        if name != "heads.rate.bias":
            assert value.eq(0).all().item() == must_be_zero, name


def test_a_new_network_predicts_zero_velocity_and_the_mean_log_rate(small_config, mixed_clips, make_pack):
    small_config.initial_log_rate = 0.75
    output = FlowceptionDiT(small_config).initialize(0)(make_pack(mixed_clips))
    assert output.velocity.eq(0).all()
    assert output.log_rate.eq(0.75).all()


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(small_config):
    first = state(FlowceptionDiT(small_config).initialize(3))
    torch.manual_seed(99)
    model = FlowceptionDiT(small_config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    second = state(model.initialize(3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = state(FlowceptionDiT(small_config).initialize(4))
    assert not torch.equal(first["embedding.latent.weight"], other["embedding.latent.weight"])


def test_weights_depend_on_names_and_not_on_their_neighbors_or_order(small_config):
    two = state(FlowceptionDiT(small_config).initialize(0))
    small_config.num_layers, small_config.num_classes = 4, 0
    four = FlowceptionDiT(small_config)
    four._modules = dict(reversed(four._modules.items()))
    four_state = state(four.initialize(0))
    shared = set(two) & set(four_state)
    assert len(shared) == len(two) - 1
    assert all(torch.equal(two[name], four_state[name]) for name in shared)
    weights = [four_state[f"blocks.{i}.attention_output.weight"] for i in range(4)]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_matrices_keep_variance():
    model = FlowceptionDiT(DiTConfig(preset="toy")).initialize(0)
    for name, value in state(model).items():
        if value.ndim == 2 and not name.endswith(ZERO) and "role" not in name:
            assert value.std().item() == pytest.approx(value.shape[1] ** -0.5, rel=0.03), name


def test_partitioned_parameters_are_written_where_they_are_gathered(small_config):
    """As under ``zero.Init``: outside ``gather`` every parameter is empty, and writing to it does nothing."""
    model = FlowceptionDiT(small_config)
    whole = {parameter: torch.full_like(parameter, float("nan")) for parameter in model.parameters()}
    for parameter in whole:
        parameter.data = torch.empty(0)

    @contextmanager
    def gather(parameters):
        for parameter in parameters:
            parameter.data = whole[parameter]
        yield True
        for parameter in parameters:
            whole[parameter], parameter.data = parameter.data, torch.empty(0)

    model.initialize(0, gather)
    expected = dict(FlowceptionDiT(small_config).initialize(0).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(whole[parameter], expected[name]), name


def test_a_process_that_must_not_write_does_not_but_takes_part_in_every_gather(small_config):
    model = FlowceptionDiT(small_config)
    before, gathered = state(model), []

    @contextmanager
    def gather(parameters):
        gathered.extend(parameters)
        yield False

    model.initialize(0, gather)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert len(gathered) == len(before)


def test_a_module_without_initial_values_is_rejected():
    with pytest.raises(TypeError, match=r"0 \(Linear\) owns parameters"):
        initialize(nn.Sequential(nn.Linear(2, 2)), 0)
