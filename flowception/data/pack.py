"""Building one pack: the visible frames of its clips, noised, with everything the losses need.

A pack is a function of the plan and the shards, so it is the same on any rank, in any worker, and after any resume. A
clip with bad bytes becomes padding in place: it keeps its tokens, which are then zero and have no loss, so that no
other clip moves. It is listed with the reason, and the next epoch's plan skips it. Clips that the caller names are
treated the same way without being read.

A clip without a caption, or drawn to be trained without its condition, has the null class and the set's null text, at
the length of that text. This equals, to the last token, the sampler's unconditional clip (``generation.predictor``).
Text stays in bfloat16, as stored in the shards; the network converts it on its device.

Shape legend: ``T`` tokens, ``F`` frame slots, ``B`` clip slots, ``R`` text rows, ``C h w`` a latent frame, ``D`` text
width, ``k`` visible frames of a clip, ``N`` frames of the longest clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception import rng
from flowception.data.draws import PackDraws
from flowception.data.plan import Plan
from flowception.data.step_plan import PackPlan
from flowception.errors import ConfigError, DataError
from flowception.flow.extended_time import ClipDraws
from flowception.flow.path import interpolate, velocity_target
from flowception.flow.task import Role, is_context
from flowception.packing.flops import ModelSpec
from flowception.packing.layout import ClipShape, ModelRole, PackInput, build_layout, latent_tokens
from flowception.rng import Stream
from flowception.shards.reader import ClipReader
from flowception.shards.schema import NO_CLASS


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be read or was skipped on request."""

    key: str
    reason: str
    tokens: int
    """Visible tokens that became padding."""


@dataclass
class Pack(PackInput):
    """A network's input together with the targets of its losses."""

    velocity_target: Tensor
    """[T, C]: x_1 - x_0 at tokens with a velocity loss, zero elsewhere."""
    velocity_mask: Tensor
    """bool [T]: latent tokens of generated frames in flow state."""
    missing: Tensor
    """int64 [F]: deleted frames between a frame and the next visible one or the clip's end."""
    insertion_mask: Tensor
    """bool [F]: frames with an insertion loss."""
    weight_token: Tensor
    """float32 [T]: importance weight of the token's clip; zero for padding."""
    weight_frame: Tensor
    """float32 [F]: importance weight of the frame's clip; zero for unused slots."""
    keys: tuple[str, ...]
    """Keys of the clips, by clip slot."""
    bad_clips: tuple[BadClip, ...]
    """Clips of this pack that became padding."""


@dataclass
class _ClipContent:
    """One clip after reading and noising."""

    noisy: Tensor
    """[k h w, C]."""
    condition: Tensor
    target: Tensor
    text: Tensor | None
    """[L, D]."""


def _clip_shapes(plan: Plan, rows: NDArray[np.int64], draws: PackDraws) -> list[ClipShape]:
    clips = plan.index.clips[rows]
    sizes = (draws.clips.visible_frames, clips["height"], clips["width"], draws.text_tokens)
    return [ClipShape(*clip) for clip in zip(*(size.tolist() for size in sizes))]


def _read_clip(plan: Plan, row: int, epoch: int, draws: ClipDraws, slot: int, reader: ClipReader) -> _ClipContent:
    """Read the visible frames of one clip and noise them.

    Noise is drawn for frames in flow state. Context and terminal frames are clean and need none.
    """
    frames = torch.nonzero(draws.visible[slot]).flatten()
    latents, text = reader.read_clip(row, frames.numpy())
    x_1 = latents.float()
    if not (torch.isfinite(x_1).all() and (text is None or torch.isfinite(text).all())):
        raise DataError(f"clip {plan.index.key(row)} contains NaN or infinity; encode it again")
    in_flow = draws.flow_mask[slot, frames]
    x_0, identity = torch.zeros_like(x_1), int(plan.index.clips["clip_id"][row])
    for position in torch.nonzero(in_flow).flatten().tolist():
        noise = rng.normals(
            plan.seed, Stream.NOISE, tuple(x_1.shape[1:]), epoch=epoch, clip=identity, frame=int(frames[position])
        )
        x_0[position] = torch.from_numpy(noise)
    flow = in_flow[:, None, None, None]
    x_t = torch.where(flow, interpolate(x_0, x_1, draws.shown_time[slot, frames]), x_1)
    context = is_context(draws.roles[slot, frames])[:, None, None, None]
    return _ClipContent(
        noisy=latent_tokens(x_t),
        condition=latent_tokens(torch.where(context, x_1, 0.0)),
        target=latent_tokens(torch.where(flow, velocity_target(x_0, x_1), 0.0)),
        text=text,
    )


def _blank_pack(plan: Plan, shapes: list[ClipShape], keys: tuple[str, ...], text_width: int | None) -> Pack:
    layout, channels = build_layout(shapes, plan.pack_shape), plan.spec.in_channels
    tokens, frames, clips = layout.shape.token_budget, layout.shape.max_frames, layout.shape.max_clips
    text = None if text_width is None else torch.zeros(len(layout.text_token), text_width, dtype=torch.bfloat16)
    return Pack(
        layout=layout,
        noisy=torch.zeros(tokens, channels),
        condition=torch.zeros(tokens, channels),
        time=torch.zeros(frames),
        role=torch.zeros(frames, dtype=torch.int64),
        class_label=torch.full((clips,), NO_CLASS, dtype=torch.int64),
        text=text,
        velocity_target=torch.zeros(tokens, channels),
        velocity_mask=torch.zeros(tokens, dtype=torch.bool),
        missing=torch.zeros(frames, dtype=torch.int64),
        insertion_mask=torch.zeros(frames, dtype=torch.bool),
        weight_token=torch.zeros(tokens),
        weight_frame=torch.zeros(frames),
        keys=keys,
        bad_clips=(),
    )


def empty_pack(plan: Plan) -> Pack:
    """A pack of padding only, for a micro-step where a rank has no pack."""
    return _blank_pack(plan, [], (), plan.spec.text_dim)


def _fill_frames(pack: Pack, draws: ClipDraws) -> None:
    """Fill in frame values that need no reading. Visible frames of all clips, in order, are the first frame slots."""
    visible = draws.visible
    used = slice(0, int(visible.sum()))
    pack.time[used] = draws.shown_time[visible].float()
    pack.role[used] = model_role(draws.roles)[visible]
    pack.missing[used] = draws.missing[visible]
    pack.insertion_mask[used] = draws.insertion_mask[visible]
    weight = draws.weight.float()
    pack.weight_frame[used] = weight[pack.layout.frame_clip[used]]
    total = sum(pack.layout.segment_lengths[: len(pack.keys)])
    pack.weight_token[:total] = weight[pack.layout.token_clip[:total]]
    latent = pack.layout.latent_mask
    in_flow = torch.zeros(len(pack.time), dtype=torch.bool)
    in_flow[used] = draws.flow_mask[visible]
    pack.velocity_mask[latent] = in_flow[pack.layout.token_frame[latent]]


def _silence(pack: Pack, slot: int) -> None:
    """Turn a clip into padding in place."""
    frames = pack.layout.frame_valid & (pack.layout.frame_clip == slot)
    start = sum(pack.layout.segment_lengths[:slot])
    tokens = slice(start, start + pack.layout.segment_lengths[slot])
    pack.velocity_mask[tokens], pack.weight_token[tokens] = False, 0.0
    pack.insertion_mask[frames], pack.weight_frame[frames] = False, 0.0
    pack.missing[frames], pack.time[frames], pack.role[frames] = 0, 0.0, 0


def build_pack(
    plan: Plan, pack_plan: PackPlan, reader: ClipReader, skipped: Mapping[str, str] = MappingProxyType({})
) -> Pack:
    """Read a pack's clips and build the network's input from them.

    Args:
        plan: The plan that made ``pack_plan``.
        pack_plan: The clips of the pack.
        reader: Reader of the clips.
        skipped: Keys of clips to treat as bad without reading them, with the reason.

    Returns:
        The pack, on the CPU; ``bad_clips`` lists clips that could not be read or were skipped.

    Raises:
        ConfigError: If channels or text width of the set and the network differ, or the null text is not the plan's.
    """
    check_widths(plan.spec, reader)
    uses_text = plan.spec.text_dim is not None
    if uses_text and (reader.null_text is None or len(reader.null_text) != plan.null_text_tokens):
        raise ConfigError(
            f"the plan's null_text_tokens must be the length of the set's null text, got {plan.null_text_tokens} and "
            f"{None if reader.null_text is None else len(reader.null_text)}"
        )
    draws, rows = plan.clip_draws(pack_plan), pack_plan.rows.tolist()
    shapes = _clip_shapes(plan, pack_plan.rows, draws)
    pack = _blank_pack(plan, shapes, tuple(plan.index.key(row) for row in rows), plan.spec.text_dim)
    _fill_frames(pack, draws.clips)
    bad, at, at_text = [], 0, 0
    for slot, row in enumerate(rows):
        shape = shapes[slot]
        latent = torch.nonzero(pack.layout.token_kind[at : at + shape.tokens] == 0).flatten() + at
        try:
            if pack.keys[slot] in skipped:
                raise DataError(skipped[pack.keys[slot]])
            clip = _read_clip(plan, row, pack_plan.epoch, draws.clips, slot, reader)
        except DataError as error:
            bad.append(BadClip(pack.keys[slot], str(error), shape.tokens))
            _silence(pack, slot)
        else:
            pack.noisy[latent], pack.condition[latent] = clip.noisy, clip.condition
            pack.velocity_target[latent] = clip.target
            if draws.keeps_condition[slot] and plan.spec.num_classes:
                pack.class_label[slot] = int(plan.index.clips["class_label"][row])
            text = clip.text if draws.shows_caption[slot] else reader.null_text
            if pack.text is not None and text is not None:
                pack.text[at_text : at_text + shape.text_tokens] = text
        at, at_text = at + shape.tokens, at_text + shape.text_tokens
    pack.bad_clips = tuple(bad)
    return pack


def model_role(roles: Tensor) -> Tensor:
    """The roles that the network receives, as ``ModelRole`` numbers. Start frames and free frames share one role.

    Args:
        roles: ``Role`` numbers, any shape. ABSENT becomes GENERATED, the neutral value of unused slots.

    Returns:
        int64, same shape.
    """
    generated = torch.full_like(roles, int(ModelRole.GENERATED), dtype=torch.int64)
    active = torch.where(roles == Role.CONTEXT_ACTIVE, int(ModelRole.ACTIVE), generated)
    return torch.where(roles == Role.CONTEXT_PASSIVE, int(ModelRole.PASSIVE), active)


def check_widths(spec: ModelSpec, reader: ClipReader) -> None:
    """Check that a network fits a set's clips.

    Args:
        spec: Sizes of the network.
        reader: Reader of the set.

    Raises:
        ConfigError: If channels or text widths differ, or the network needs text and the set has none.
    """
    if reader.latent_channels != spec.in_channels:
        raise ConfigError(
            f"the set has {reader.latent_channels} latent channels, but model.in_channels is {spec.in_channels}; "
            f"set model.in_channels={reader.latent_channels}"
        )
    if spec.text_dim is not None and reader.text_width is None:
        raise ConfigError(
            f"the set has no text, but model.text_dim is {spec.text_dim}; encode with captions (text.model), or set "
            "model.text_dim=0"
        )
    if spec.text_dim is not None and reader.text_width != spec.text_dim:
        raise ConfigError(
            f"the set has text of width {reader.text_width}, but model.text_dim is {spec.text_dim}; "
            f"set model.text_dim={reader.text_width}"
        )
