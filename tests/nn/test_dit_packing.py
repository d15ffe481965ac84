"""A clip's output depends on that clip only: alone, among other clips, and with padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowception.errors import DataError
from flowception.nn import FlowceptionDiT, PackShape, TokenKind
from flowception.nn.layers import Float32Linear

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def weights_like(output, seed=5):
    """Random weights of a loss with both outputs, of the scale of a mean."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(part.shape, generator=generator) / part.numel() ** 0.5 for part in output]


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))


def parts_of(layout, output, clip):
    tokens = (layout.token_clip == clip) & (layout.token_kind != TokenKind.PADDING)
    frames = (layout.frame_clip == clip) & layout.frame_valid
    return output[0][tokens], output[1][frames]


def roomy(clips, extra_tokens=50):
    tight = vars(PackShape.tight(clips))
    return PackShape(**{name: value + (extra_tokens if name == "token_budget" else 4) for name, value in tight.items()})


@pytest.mark.parametrize("padded", [False, True])
def test_packed_equals_one_clip_at_a_time(model, mixed_clips, make_pack, take_clip, padded):
    pack = make_pack(mixed_clips, shape=roomy(mixed_clips) if padded else None)
    output = model(pack)
    weights = weights_like(output)
    packed_loss, single_loss = 0.0, 0.0
    for clip in range(len(mixed_clips)):
        packed = parts_of(pack.layout, output, clip)
        single = model(take_clip(pack, clip, mixed_clips))
        torch.testing.assert_close(packed, tuple(single), **TOLERANCE)
        for here, alone, weight in zip(packed, single, parts_of(pack.layout, weights, clip)):
            packed_loss = packed_loss + (here * weight).sum()
            single_loss = single_loss + (alone * weight).sum()
    torch.testing.assert_close(gradients(model, packed_loss), gradients(model, single_loss), **TOLERANCE)


def test_padding_changes_nothing(model, mixed_clips, make_pack):
    tight = make_pack(mixed_clips)
    shape = roomy(mixed_clips)
    padded = make_pack(mixed_clips, shape=shape, seed=1)
    tokens, frames = tight.layout.shape.token_budget, tight.layout.shape.max_frames
    padded.noisy[:tokens], padded.condition[:tokens] = tight.noisy, tight.condition
    padded.time[:frames], padded.role[:frames] = tight.time, tight.role
    padded.class_label[: len(mixed_clips)] = tight.class_label
    padded.text[: tight.text.shape[0]] = tight.text
    expected, output = model(tight), model(padded)
    torch.testing.assert_close(output.velocity[:tokens], expected.velocity, **TOLERANCE)
    torch.testing.assert_close(output.log_rate[:frames], expected.log_rate, **TOLERANCE)
    assert output.velocity[tokens:].eq(0).all()
    assert output.log_rate[frames:].eq(0).all()
    weights = weights_like(expected)
    loss = sum((part * weight).sum() for part, weight in zip(expected, weights))
    padded_loss = (output[0][:tokens] * weights[0]).sum() + (output[1][:frames] * weights[1]).sum()
    torch.testing.assert_close(gradients(model, padded_loss), gradients(model, loss), **TOLERANCE)


@pytest.mark.parametrize("changed", range(6))
def test_changing_one_clip_changes_no_other_to_the_bit(model, mixed_clips, make_pack, changed):
    shape = roomy(mixed_clips)
    pack, other = make_pack(mixed_clips, 0, shape), make_pack(mixed_clips, 1, shape)
    layout = pack.layout
    token = (layout.token_clip == changed) & (layout.token_kind != TokenKind.PADDING)
    frame = (layout.frame_clip == changed) & layout.frame_valid
    slot = torch.arange(shape.max_clips) == changed
    text_row = layout.token_clip[layout.text_token] == changed
    mixed = replace(
        pack,
        noisy=torch.where(token[:, None], other.noisy, pack.noisy),
        condition=torch.where(token[:, None], other.condition, pack.condition),
        time=torch.where(frame, other.time, pack.time),
        role=torch.where(frame, other.role, pack.role),
        class_label=torch.where(slot, (pack.class_label + 2) % 4, pack.class_label),
        text=torch.where(text_row[:, None], other.text, pack.text),
    )
    before, after = model(pack), model(mixed)
    for clip in range(len(mixed_clips)):
        for x, y in zip(parts_of(layout, before, clip), parts_of(layout, after, clip)):
            assert torch.equal(x, y) == (clip != changed), clip


def test_an_empty_pack_runs_every_module_and_gives_gradients_of_zero(model, make_pack):
    shape = PackShape(token_budget=12, max_frames=2, max_clips=1, max_seqlen=5)
    ran = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    output = model(make_pack([], shape=shape))
    assert ran | {"blocks"} == {name for name, _ in model.named_modules()}
    loss = 0.0 * (output.velocity.sum() + output.log_rate.sum())
    for name, gradient in gradients(model, loss).items():
        assert gradient.eq(0).all(), name


def test_output_is_float32_and_has_no_meaning_but_at_its_tokens(model, mixed_clips, make_pack):
    pack = make_pack(mixed_clips)
    output = model.bfloat16()(pack)
    assert output.velocity.dtype == output.log_rate.dtype == torch.float32
    assert output.velocity[~pack.layout.latent_mask].eq(0).all()
    assert output.velocity[pack.layout.latent_mask].ne(0).all()
    assert torch.isfinite(output.velocity).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_log_rates_of_a_bf16_network_are_not_rounded_to_bf16(model, mixed_clips, make_pack, monkeypatch, autocast):
    """And are nearer the float32 network's than those of a rate head in bf16."""
    pack = make_pack(mixed_clips)
    with torch.no_grad():
        model.heads.rate.bias += 2.8
        model.bfloat16().float()
        exact = model(pack).log_rate

        def low() -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return (model if autocast else model.bfloat16())(pack).log_rate.float()

        ours = low()
        linear = torch.nn.Linear.forward
        monkeypatch.setattr(Float32Linear, "forward", lambda layer, x: linear(layer, x.to(layer.weight.dtype)))
        rounded = low()
    assert (ours != ours.bfloat16().float()).float().mean() > 0.9
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert (ours - exact).abs().mean() < 0.6 * (rounded - exact).abs().mean()


@pytest.mark.parametrize(
    ("activation_checkpointing", "runs"), [(False, [1, 1]), (1, [2, 1]), (2, [2, 2]), (True, [2, 2])]
)
def test_activation_checkpointing_changes_nothing(model, mixed_clips, make_pack, activation_checkpointing, runs):
    """The first blocks run twice, and outputs and gradients are equal to the bit."""
    pack = make_pack(mixed_clips)
    output = model(pack)
    weights = weights_like(output)

    def loss(output):
        return sum((part * weight).sum() for part, weight in zip(output, weights))

    plain = gradients(model, loss(output))
    model.config.activation_checkpointing = activation_checkpointing
    ran = [0, 0]
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: ran.__setitem__(number, ran[number] + 1))
    output_again = model(pack)
    again = gradients(model, loss(output_again))
    assert ran == runs
    assert all(torch.equal(*parts) for parts in zip(output, output_again, strict=True))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_text_and_its_absence_must_agree_with_the_network(model, small_config, mixed_clips, make_pack):
    with pytest.raises(DataError, match="built with text_dim=6 but the pack has no text"):
        model(make_pack(mixed_clips, with_text=False))
    small_config.text_dim = 0
    with pytest.raises(DataError, match="the network was built without it; set model.text_dim"):
        FlowceptionDiT(small_config).initialize(0)(make_pack(mixed_clips))
