"""Every input of the network reaches its output, by the intended path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowception.nn import ClipShape, FlowceptionDiT

CLIPS = [ClipShape(3, 2, 2, 2)]
CHANGED = 1
PARTS = ("shift_1", "scale_1", "gate_1", "shift_2", "scale_2", "gate_2")


def frame_outputs(model, pack):
    """Velocity and log-rate of each frame, [F, ...]."""
    output = model(pack)
    velocity = output.velocity[pack.layout.latent_mask].unflatten(0, (pack.layout.shape.max_frames, -1))
    return torch.cat([velocity.flatten(1), output.log_rate.unsqueeze(1)], dim=1)


def changes(model, pack, other):
    """Which frames' outputs differ between two packs."""
    return (frame_outputs(model, pack) - frame_outputs(model, other)).abs().amax(dim=1) > 1e-4


def later(pack):
    """The same pack with frame 1's time changed."""
    return replace(pack, time=pack.time.index_fill(0, torch.tensor([CHANGED]), 0.9))


def cut_time(model, keep_block=(), keep_output=()):
    """Remove time from every modulation except the given parts, which then depend only on time.

    Biases stay: all gates are open, with values that do not depend on time.
    """
    with torch.no_grad():
        for block in model.blocks:
            for part, weight in zip(PARTS, block.frame_modulation.weight.chunk(6)):
                weight.mul_(float(part in keep_block))
        for part, weight in zip(("shift", "scale"), model.heads.frame_modulation.weight.chunk(2)):
            weight.mul_(float(part in keep_output))


def close_gates(model, *parts):
    """Set gates to zero, so that attention or the MLP contributes nothing."""
    with torch.no_grad():
        for block in model.blocks:
            for name, weight, bias in zip(
                PARTS, block.frame_modulation.weight.chunk(6), block.frame_modulation.bias.chunk(6)
            ):
                if name in parts:
                    weight.zero_()
                    bias.zero_()


@pytest.fixture
def single(small_config, randomized) -> FlowceptionDiT:
    """One layer, without zero weights, with strong modulations."""
    small_config.num_layers = 1
    return randomized(FlowceptionDiT(small_config).initialize(0), scale=1.0)


@pytest.fixture
def pack(make_pack):
    return replace(make_pack(CLIPS), time=torch.tensor([0.2, 0.3, 0.6]))


@pytest.mark.parametrize("part", ["shift_1", "scale_1", "gate_1"])
def test_time_reaches_attention(single, pack, part):
    cut_time(single, keep_block=[part])
    close_gates(single, "gate_2")
    expected = [part != "gate_1", True, part != "gate_1"]  # others see its keys and values, never its gate
    assert changes(single, pack, later(pack)).tolist() == expected


@pytest.mark.parametrize("part", ["shift_2", "scale_2", "gate_2"])
def test_time_reaches_the_mlp(single, pack, part):
    cut_time(single, keep_block=[part])
    close_gates(single, "gate_1")
    assert changes(single, pack, later(pack)).tolist() == [False, True, False]


@pytest.mark.parametrize("part", ["shift", "scale"])
def test_time_reaches_the_output(single, pack, part):
    cut_time(single, keep_output=[part])
    close_gates(single, "gate_1", "gate_2")
    assert changes(single, pack, later(pack)).tolist() == [False, True, False]


def test_time_has_no_other_way_in(single, pack):
    cut_time(single)
    assert changes(single, pack, later(pack)).tolist() == [False] * 3


def test_the_condition_channels_change_the_output(single, pack):
    latent = pack.layout.latent_mask.unsqueeze(1)
    other = replace(pack, condition=torch.where(latent, pack.condition + 0.5, 0.0))
    assert changes(single, pack, other).all()


@pytest.mark.parametrize("role", [0, 1, 2])
def test_each_role_changes_its_frame_and_is_told_to_the_others(single, pack, role):
    here = replace(pack, role=torch.full((3,), role))
    other = replace(pack, role=torch.tensor([role, (role + 1) % 3, role]))
    assert changes(single, here, other).all()


def test_roles_reach_latent_tokens_and_insertion_tokens_without_attention(single, pack):
    close_gates(single, "gate_1")
    other = replace(pack, role=(pack.role + torch.tensor([0, 1, 0])) % 3)
    before, after = single(pack), single(other)
    latent_changed = (before.velocity != after.velocity).any(dim=1)
    assert torch.equal(latent_changed, pack.layout.latent_mask & (pack.layout.token_frame == CHANGED))
    assert (before.log_rate != after.log_rate).tolist() == [False, True, False]


@pytest.mark.parametrize("label", [-1, 0, 3])
def test_every_class_is_its_own(single, pack, label):
    here = replace(pack, class_label=torch.tensor([label]))
    for other in {-1, 0, 3} - {label}:
        assert changes(single, here, replace(pack, class_label=torch.tensor([other]))).all()


def test_text_reaches_frames_through_attention(single, pack):
    other = replace(pack, text=pack.text + 1.0)
    assert changes(single, pack, other).all()
    close_gates(single, "gate_1")
    assert not changes(single, pack, other).any()


def test_text_has_its_own_modulation(small_config, randomized, pack):
    """Without it, text leaves the first layer unmodulated, which affects frames in the second."""
    model = randomized(FlowceptionDiT(small_config).initialize(0), scale=1.0)
    before = frame_outputs(model, pack)
    with torch.no_grad():
        model.blocks[0].text_modulation.weight.zero_()
        model.blocks[0].text_modulation.bias.zero_()
    assert (frame_outputs(model, pack) - before).abs().amax() > 1e-3


def test_class_reaches_the_modulation_of_text(single, pack):
    seen = []
    single.blocks[0].text_modulation.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for label in (-1, 2):
        single(replace(pack, class_label=torch.tensor([label])))
    assert (seen[0] - seen[1]).abs().min() > 0


def test_queries_and_keys_are_normed_and_turned_by_position_and_values_are_not(single, pack):
    block, entered, attended = single.blocks[0], [], []

    def attend(query, key, value, layout):
        attended.extend([query, key, value])
        return value

    single.attend = attend
    block.query_key_value.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    single(pack)
    position = single.rope.positions(pack.layout)
    angle = position[:, single.rope.axis] * torch.from_numpy(single.rope.frequency).float()
    parts = (entered[0] @ block.query_key_value.weight.T).unflatten(-1, (3, 2, 16)).unbind(1)
    for found, part, norm in zip(attended, parts, (block.query_norm, block.key_norm, None)):
        expected = part
        if norm is not None:
            even, odd = (
                (part / part.square().mean(-1, keepdim=True).sqrt() * norm.weight).unflatten(-1, (8, 2)).unbind(-1)
            )
            cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
            expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count_embedding", [True, False])
def test_the_count_embedding_tells_rank_and_number_of_visible_frames(
    small_config, randomized, make_pack, count_embedding
):
    small_config.count_embedding = count_embedding
    model = randomized(FlowceptionDiT(small_config).initialize(0))
    close_gates(model, "gate_1")
    rates = []
    for frames in (2, 3):
        pack = make_pack([ClipShape(frames, 1, 1)])
        pack = replace(pack, time=torch.full((frames,), 0.5), role=torch.zeros(frames, dtype=torch.int64))
        rates.append(model(replace(pack, class_label=torch.tensor([0]))).log_rate)
    by_rank, by_number = (float((rates[0][0] - other).abs()) for other in (rates[0][1], rates[1][0]))
    assert min(by_rank, by_number) > 1e-2 if count_embedding else max(by_rank, by_number) < 1e-5


@pytest.mark.parametrize("grid_embedding", [True, False])
def test_the_grid_embedding_tells_a_token_its_row_and_column(small_config, randomized, make_pack, grid_embedding):
    small_config.grid_embedding = grid_embedding
    model = randomized(FlowceptionDiT(small_config).initialize(0))
    close_gates(model, "gate_1")
    pack = make_pack([ClipShape(1, 2, 3)])
    latent = pack.layout.latent_mask
    alike = torch.where(latent.unsqueeze(1), 0.5, 0.0).expand_as(pack.noisy)
    velocity = model(replace(pack, noisy=alike, condition=torch.zeros_like(alike))).velocity[latent]
    distances = torch.pdist(velocity)
    assert bool((distances > 1e-3).all() if grid_embedding else (distances < 1e-6).all())


def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(model, mixed_clips, make_pack):
    """Every parameter contributes: nothing is computed and discarded."""
    pack = make_pack(mixed_clips)
    assert set(pack.role.tolist()) == {0, 1, 2}
    output = model(pack)
    generator = torch.Generator().manual_seed(2)
    loss = sum((part * torch.randn(part.shape, generator=generator)).mean() for part in output)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 1e-8, name
    for table, used in ((model.embedding.role, pack.role), (model.class_embedding, pack.class_label % 5)):
        rows = table.weight.grad.abs().amax(dim=1) > 1e-8
        assert rows.nonzero().flatten().tolist() == sorted(set(used.tolist()))


def test_saved_and_loaded_weights_give_the_same_output(model, small_config, mixed_clips, make_pack):
    pack = make_pack(mixed_clips)
    copy = FlowceptionDiT(small_config)
    copy.load_state_dict(model.state_dict())
    for ours, theirs in zip(model(pack), copy(pack)):
        assert torch.equal(ours, theirs)
