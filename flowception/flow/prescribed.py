"""Prescribed orders at sampling: the length is given, and delays drawn from a law say when each frame is born.

A clip is laid out in full, roles and delays are drawn as in training, and each delay ``u`` becomes a whole step: a
frame is born at the end of step ``ceil(u N)``, where a frame of the learned order with that delay would be. So ages
stay whole steps and times exact. Under ``autoregressive`` a frame is born in the step in which the one before it
finishes. Draws are keyed by clip seed and frame.

Shape legend: ``n`` frames of a finished clip, ``K`` of them given, ``P`` frames of all finished clips, ``F`` visible
frames of all clips, ``N`` is ``num_inference_steps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception.errors import ConfigError
from flowception.flow.delays import DelayLaw, rank_among
from flowception.flow.schedule import InsertionSchedule
from flowception.flow.task import Role
from flowception.rng import Stream, uniforms


class ClipPlan(NamedTuple):
    """A clip before it is sampled."""

    roles: Tensor
    """int64 [n], a ``Role`` for each frame."""
    born_step: Tensor
    """int64 [n], step at whose end it is born; 0 for frames there from the beginning."""


def _roles(num_frames: int, context_roles: Tensor, places: Sequence[int], num_start_frames: int, u: Tensor) -> Tensor:
    """Roles as a task gives them, int64 [1, n]: context, start frames at random (frame 0 if it is not given), free."""
    roles = torch.full((1, num_frames), int(Role.FREE))
    roles[0, list(places)] = context_roles
    generated = roles == Role.FREE
    key = u.clone()
    key[:, 0] = -1.0  # frame 0, where it is generated, comes before all others
    starts = max(num_start_frames, int(bool(generated[0, 0])))
    return torch.where(generated & (rank_among(generated, key) < starts), int(Role.START), roles)


def _check(num_frames: int, context_roles: Tensor, places: Sequence[int]) -> None:
    given = len(context_roles)
    if given >= num_frames:
        raise ConfigError(
            f"num_frames must be greater than the number of context frames, got {num_frames} and {given}; raise "
            "num_frames"
        )
    in_order = list(places) == sorted(set(places))
    if len(places) != given or not in_order or not all(0 <= place < num_frames for place in places):
        raise ConfigError(
            f"context places must be {given} ascending frame indices from 0 to {num_frames - 1}, got {list(places)}"
        )
    for place, role in zip(places, context_roles.tolist()):
        if role == Role.CONTEXT_PASSIVE and place + 1 < num_frames and place + 1 not in places:
            raise ConfigError(
                f"context frame {place} of {num_frames} must be active because the frame to its right is generated; "
                "mark it in Context.active"
            )


def plan_clip(
    law: DelayLaw,
    num_frames: int,
    *,
    num_inference_steps: int,
    num_start_frames: int,
    schedule: InsertionSchedule,
    seed: int,
    context_roles: Tensor,
    places: Sequence[int] | None = None,
) -> ClipPlan:
    """Draw when each frame of a clip is born.

    Args:
        law: The prescribed law.
        num_frames: n.
        num_inference_steps: N.
        num_start_frames: Start frames asked for; frame 0 is one where it is not given.
        schedule: kappa, as in training.
        seed: The clip's.
        context_roles: int64 [K], roles of the given frames.
        places: [K], their places in the clip; None for the first K.

    Returns:
        Roles and birth steps.

    Raises:
        ConfigError: If length, context and places do not go together.
    """
    where = range(len(context_roles)) if places is None else [int(place) for place in places]
    _check(num_frames, context_roles, where)
    u = torch.from_numpy(uniforms(0, Stream.SAMPLER, epoch=0, clip=seed, frame=np.arange(num_frames)))
    drawn = _roles(num_frames, context_roles, where, num_start_frames, u[None, :, 1])
    roles = law.adapt_roles(drawn)
    delay = law.delays(roles, u[None, :, 0], schedule)
    return ClipPlan(roles[0], torch.ceil(delay[0] * num_inference_steps).to(torch.int64))


def due_counts(births: Tensor, step: int) -> NDArray[np.int64]:
    """Frames born at the end of a step right of each visible frame, int64 [F].

    Args:
        births: int64 [P], birth step of every frame of the finished clips, clip by clip; a clip's first is 0.
        step: Steps made before; frames born up to it are visible.
    """
    visible = np.flatnonzero(births.numpy() <= step)
    due = np.cumsum(births.numpy() == step + 1)
    counts: NDArray[np.int64] = np.diff(due[visible], append=due[-1])
    return counts
