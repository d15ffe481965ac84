"""The complete network under each attention pattern: which frames reach which through all layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowception.nn import ClipShape, FlowceptionDiT, TokenKind
from flowception.nn.presets import DiTConfig

PATTERNS = [("full", None), ("causal", None), ("window", 1), ("window", 2)]
CLIPS = [ClipShape(7, 2, 1, 3), ClipShape(2, 1, 3, 0), ClipShape(9, 1, 2, 2), ClipShape(9, 1, 2, 2)]
LAYERS = 2


def network(small_config: DiTConfig, randomized, pattern) -> FlowceptionDiT:
    name, window = pattern
    config = replace(small_config, num_layers=LAYERS, attention_pattern=name, attention_window_frames=window)
    return randomized(FlowceptionDiT(config).initialize(0))


def change_frame(pack, other, slot):
    """The pack with everything of one frame slot taken from another pack."""
    layout = pack.layout
    frame_token = (layout.token_kind == TokenKind.LATENT) | (layout.token_kind == TokenKind.INSERTION)
    token = (layout.token_frame == slot) & frame_token
    frame = torch.arange(len(pack.time)) == slot
    return replace(
        pack,
        noisy=torch.where(token[:, None], other.noisy, pack.noisy),
        condition=torch.where(token[:, None], other.condition, pack.condition),
        time=torch.where(frame, other.time, pack.time),
        role=torch.where(frame, (pack.role + 1) % 3, pack.role),
    )


def reached(pattern, changed_rank, rank):
    """Whether a frame's output can depend on another frame of its clip."""
    name, window = pattern
    if name == "causal":
        return rank >= changed_rank
    return name == "full" or abs(rank - changed_rank) <= LAYERS * window


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("changed_rank", [0, 4, 8])
def test_a_changed_frame_reaches_those_that_the_pattern_lets_it_and_no_other(
    small_config, randomized, make_pack, pattern, changed_rank
):
    model = network(small_config, randomized, pattern)
    pack, other = make_pack(CLIPS, 0), make_pack(CLIPS, 1)
    layout = pack.layout
    slot = int(torch.nonzero((layout.frame_clip == 2) & (layout.frame_rank == changed_rank) & layout.frame_valid))
    before, after = model(pack), model(change_frame(pack, other, slot))
    for frame in torch.nonzero(layout.frame_valid).flatten().tolist():
        tokens = (layout.token_frame == frame) & layout.latent_mask
        same_velocity = torch.equal(before.velocity[tokens], after.velocity[tokens])
        same_rate = torch.equal(before.log_rate[frame], after.log_rate[frame])
        may = layout.frame_clip[frame] == 2 and reached(pattern, changed_rank, int(layout.frame_rank[frame]))
        assert (same_velocity, same_rate) == (not may, not may), frame


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
def test_text_reaches_every_frame_of_its_clip(small_config, randomized, make_pack, pattern):
    model, pack = network(small_config, randomized, pattern), make_pack(CLIPS)
    layout = pack.layout
    text = pack.text.clone()
    text[0] += 1.0
    before, after = model(pack), model(replace(pack, text=text))
    changed = before.log_rate != after.log_rate
    assert torch.equal(changed, (layout.frame_clip == 0) & layout.frame_valid)


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
def test_packed_equals_one_clip_at_a_time(small_config, randomized, make_pack, take_clip, pattern):
    model, pack = network(small_config, randomized, pattern), make_pack(CLIPS)
    output = model(pack)
    packed_loss, alone_loss = 0.0, 0.0
    for clip in range(len(CLIPS)):
        tokens = pack.layout.token_clip == clip
        frames = pack.layout.frame_clip == clip
        alone = model(take_clip(pack, clip, CLIPS))
        torch.testing.assert_close(alone.velocity, output.velocity[tokens], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.log_rate, output.log_rate[frames], rtol=1e-5, atol=1e-5)
        packed_loss = packed_loss + output.velocity[tokens].square().mean() + output.log_rate[frames].square().mean()
        alone_loss = alone_loss + alone.velocity.square().mean() + alone.log_rate.square().mean()
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (packed_loss, alone_loss)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
