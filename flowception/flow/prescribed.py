"""Sampling in a prescribed order: the length is an input, and delays drawn from a law set when each frame is born.

Roles and delays are drawn for the complete clip, as in training. A frame with delay ``u`` is born at the end of step
``ceil(u N)``, as in the learned order, so ages are integer steps and times are exact. Under ``autoregressive`` a frame
is born in the step in which the previous frame finishes. Draws are keyed by clip seed and frame.

Shape legend: ``n`` frames of a finished clip, ``K`` of them context, ``P`` frames of all finished clips, ``F`` visible
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
    """Roles and birth steps of a clip, drawn before sampling."""

    roles: Tensor
    """int64 [n], a ``Role`` for each frame."""
    born_step: Tensor
    """int64 [n], step at the end of which each frame is born; 0 for context and start frames."""


def _roles(num_frames: int, context_roles: Tensor, places: Sequence[int], num_start_frames: int, u: Tensor) -> Tensor:
    """Roles as drawn by a task, int64 [1, n]: context, random start frames (always frame 0 if generated), free."""
    roles = torch.full((1, num_frames), int(Role.FREE))
    roles[0, list(places)] = context_roles
    generated = roles == Role.FREE
    key = u.clone()
    key[:, 0] = -1.0  # frame 0, if generated, ranks first
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
    """Draw the birth step of each frame of a clip.

    Args:
        law: The prescribed law.
        num_frames: n.
        num_inference_steps: N.
        num_start_frames: Requested start frames; frame 0 is always one if it is generated.
        schedule: kappa, as in training.
        seed: Seed of the clip.
        context_roles: int64 [K], roles of the context frames.
        places: [K], their indices in the clip; None for the first K.

    Returns:
        Roles and birth steps.

    Raises:
        ConfigError: If length, context and places are inconsistent.
    """
    where = range(len(context_roles)) if places is None else [int(place) for place in places]
    _check(num_frames, context_roles, where)
    u = torch.from_numpy(uniforms(0, Stream.SAMPLER, epoch=0, clip=seed, frame=np.arange(num_frames)))
    drawn = _roles(num_frames, context_roles, where, num_start_frames, u[None, :, 1])
    roles = law.adapt_roles(drawn)
    delay = law.delays(roles, u[None, :, 0], schedule)
    return ClipPlan(roles[0], torch.ceil(delay[0] * num_inference_steps).to(torch.int64))


def due_counts(births: Tensor, step: int) -> NDArray[np.int64]:
    """Number of frames born at the end of a step to the right of each visible frame, int64 [F].

    Args:
        births: int64 [P], birth step of every frame of the finished clips, clip by clip; 0 for a clip's first frame.
        step: Steps already made; frames born up to this step are visible.
    """
    visible = np.flatnonzero(births.numpy() <= step)
    due = np.cumsum(births.numpy() == step + 1)
    counts: NDArray[np.int64] = np.diff(due[visible], append=due[-1])
    return counts
