"""Small networks with nothing left at zero, and packs of random content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from flowception.nn import ClipShape, DiTConfig, FlowceptionDiT, PackInput, PackShape, TokenKind, build_layout

CHANNELS, TEXT_DIM, CLASSES = 3, 6, 4


def random_pack(
    clips: Sequence[ClipShape], seed: int = 0, shape: PackShape | None = None, *, with_text: bool = True
) -> PackInput:
    """Random content of every field; zero where ``PackInput`` says so."""
    generator = torch.Generator().manual_seed(seed)
    layout = build_layout(clips, shape)
    tokens, frames, slots = layout.shape.token_budget, layout.shape.max_frames, layout.shape.max_clips
    role = torch.randint(0, 3, (frames,), generator=generator)
    latent = layout.latent_mask.unsqueeze(1)
    given = latent & (role[layout.token_frame] > 0).unsqueeze(1)
    text = torch.randn(len(layout.text_token), TEXT_DIM, generator=generator)
    return PackInput(
        layout=layout,
        noisy=torch.where(latent, torch.randn(tokens, CHANNELS, generator=generator), 0.0),
        condition=torch.where(given, torch.randn(tokens, CHANNELS, generator=generator), 0.0),
        time=torch.rand(frames, generator=generator),
        role=role,
        class_label=torch.randint(-1, CLASSES, (slots,), generator=generator),
        text=text if with_text else None,
    )


def one_clip(pack: PackInput, clip: int, clips: Sequence[ClipShape]) -> PackInput:
    """The clip of a pack in a pack without other clips."""
    layout = pack.layout
    padding = layout.token_kind == TokenKind.PADDING
    tokens = (layout.token_clip == clip) & ~padding
    frames = (layout.frame_clip == clip) & layout.frame_valid
    rows = [r for r, token in enumerate(layout.text_token.tolist()) if layout.token_clip[token] == clip]
    return PackInput(
        layout=build_layout([clips[clip]]),
        noisy=pack.noisy[tokens],
        condition=pack.condition[tokens],
        time=pack.time[frames],
        role=pack.role[frames],
        class_label=pack.class_label[clip : clip + 1],
        text=None if pack.text is None else pack.text[rows],
    )


def randomize(model: FlowceptionDiT, seed: int = 7, scale: float = 0.3) -> FlowceptionDiT:
    """Add noise to every parameter, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


SMALL = DiTConfig(
    preset=None,
    in_channels=CHANNELS,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    text_dim=TEXT_DIM,
    num_classes=CLASSES,
)


@pytest.fixture
def small_config() -> DiTConfig:
    """Two layers of width 32 with text and classes."""
    return replace(SMALL)


@pytest.fixture
def model() -> FlowceptionDiT:
    """A small network with text and classes, and no parameter at zero."""
    return randomize(FlowceptionDiT(replace(SMALL)).initialize(0))


@pytest.fixture
def mixed_clips() -> list[ClipShape]:
    """Heights, widths, lengths and text lengths all differ; one clip has no text, two are alike."""
    return [
        ClipShape(3, 2, 4, 5),
        ClipShape(1, 3, 3, 0),
        ClipShape(6, 4, 2, 2),
        ClipShape(2, 1, 1, 7),
        ClipShape(2, 1, 1, 7),
        ClipShape(4, 3, 5, 1),
    ]


@pytest.fixture
def make_pack() -> Callable[..., PackInput]:
    """``random_pack``."""
    return random_pack


@pytest.fixture
def take_clip() -> Callable[..., PackInput]:
    """``one_clip``."""
    return one_clip


@pytest.fixture
def randomized() -> Callable[..., FlowceptionDiT]:
    """``randomize``."""
    return randomize
