"""Tasks: which frames of a clip are context, which are present at clock 0, and which are inserted later.

A task is a small function that assigns a ``Role`` to every frame of a clip (table in docs/method.md) from one
uniform per frame. Frame 0's uniform sets the number of context frames; the others select the context and start frames.
Each function documents its context distribution, and ``context_law`` has it in closed form. To add a task, write the
function and its law, append them to ``TASKS`` and ``context_law.CONTEXT_LAWS``, and test both. A task's number is its
index, so never reorder the table.

Shape legend: ``B`` clips (``K`` of one task), ``N`` frames of the longest clip, ``n`` frames of a clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from flowception.ranges import check_ranges, integer, one_of


class Role(IntEnum):
    """Role of a latent frame in the process."""

    ABSENT = -1
    """Padding after a clip's last frame."""
    START = 0
    """Generated; present at clock 0, as noise."""
    FREE = 1
    """Generated; inserted later."""
    CONTEXT_ACTIVE = 2
    """Given clean; frames may be inserted to its right."""
    CONTEXT_PASSIVE = 3
    """Given clean; nothing is inserted to its right."""


def is_generated(roles: Tensor) -> Tensor:
    """Whether each frame is generated (start or free)."""
    return (roles == Role.START) | (roles == Role.FREE)


def is_context(roles: Tensor) -> Tensor:
    """Whether each frame is given clean."""
    return (roles == Role.CONTEXT_ACTIVE) | (roles == Role.CONTEXT_PASSIVE)


def may_insert(roles: Tensor) -> Tensor:
    """Whether frames may be inserted to the right of each frame."""
    return is_generated(roles) | (roles == Role.CONTEXT_ACTIVE)


@dataclass(kw_only=True)
class RoleConfig:
    """Numbers of start and context frames."""

    num_start_frames: int = 3
    """Generated frames present at clock 0."""
    max_context_frames: int = 8
    """``v2v``: maximum context frames. Their number is uniform from 1 to the smaller of this and n - 1, where n is the
    clip's length."""
    max_keyframes: int = 3
    """``interpolation``: maximum keyframes between the first and last frame. Their number is uniform from 0 to the
    smaller of this and n - 3."""
    max_cuts: int = 4
    """``completion``: maximum switches between context and generated frames. Their number is uniform from 1 to the
    smaller of this and n - 1."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules = {
            "num_start_frames": integer(at_least=0),
            "max_context_frames": integer(at_least=1),
            "max_keyframes": integer(at_least=0),
            "max_cuts": integer(at_least=1),
        }
        check_ranges("", self, rules)


RoleLaw = Callable[[Tensor, Tensor, RoleConfig], Tensor]
"""``(num_frames [K], u_role [K, N], config) -> roles [K, N]`` for K clips of one task, all long enough for it."""


@dataclass(frozen=True)
class Task:
    """A named law of roles."""

    name: str
    draw: RoleLaw
    min_frames: int
    """Shorter clips would have nothing to generate and fall back to text-to-video."""


def _blank_roles(num_frames: Tensor, u_role: Tensor) -> Tensor:
    """FREE for a clip's frames, ABSENT after them."""
    inside = torch.arange(u_role.shape[1]) < num_frames[:, None]
    return torch.where(inside, int(Role.FREE), int(Role.ABSENT))


def _uniform_count(u: Tensor, least: int, most: Tensor) -> Tensor:
    """Integers uniform in ``[least, most]``, int64 [K], from uniforms [K]."""
    return least + (u * (most - least + 1)).long()


def _set_least(roles: Tensor, among: Tensor, u_role: Tensor, count: Tensor | int, role: Role) -> Tensor:
    """Assign ``role`` to the ``count`` frames of each clip with the smallest ``u_role`` in ``among``, or to all.

    All subsets of that size are equally likely. ``among`` is bool [K, N], ``count`` an int or int64 [K, 1].
    """
    order = torch.argsort(torch.where(among, u_role, torch.inf), dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return torch.where(among & (rank < count), int(role), roles)


def _start_random(roles: Tensor, u_role: Tensor, count: int) -> Tensor:
    """Turn ``count`` random FREE frames of each clip into START, or all of them if there are fewer."""
    return _set_least(roles, roles == Role.FREE, u_role, count, Role.START)


def _text_to_video(num_frames: Tensor, u_role: Tensor, config: RoleConfig) -> Tensor:
    """No context; frame 0 and ``num_start_frames - 1`` random other frames are start frames."""
    roles = _blank_roles(num_frames, u_role)
    roles[:, 0] = int(Role.START)
    return _start_random(roles, u_role, config.num_start_frames - 1)


def _image_to_video(num_frames: Tensor, u_role: Tensor, config: RoleConfig) -> Tensor:
    """Frame 0 is active context; ``num_start_frames`` random other frames are start frames."""
    roles = _blank_roles(num_frames, u_role)
    roles[:, 0] = int(Role.CONTEXT_ACTIVE)
    return _start_random(roles, u_role, config.num_start_frames)


def _video_to_video(num_frames: Tensor, u_role: Tensor, config: RoleConfig) -> Tensor:
    """Continuation: the first c frames are context, passive except the last.

    c is uniform from 1 to ``min(max_context_frames, n - 1)``. ``num_start_frames`` random others are start frames.
    """
    roles, place = _blank_roles(num_frames, u_role), torch.arange(u_role.shape[1])
    given = _uniform_count(u_role[:, 0], 1, (num_frames - 1).clamp(max=config.max_context_frames))[:, None]
    roles = torch.where(place < given, int(Role.CONTEXT_PASSIVE), roles)
    roles = torch.where(place == given - 1, int(Role.CONTEXT_ACTIVE), roles)
    return _start_random(roles, u_role, config.num_start_frames)


def _interpolation(num_frames: Tensor, u_role: Tensor, config: RoleConfig) -> Tensor:
    """The first frame, the last frame and m random keyframes between them are context, active except the last.

    m is uniform from 0 to ``min(max_keyframes, n - 3)``; all choices of m keyframes are equally likely. There are no
    start frames.
    """
    roles, place = _blank_roles(num_frames, u_role), torch.arange(u_role.shape[1])
    last = num_frames[:, None] - 1
    keyframes = _uniform_count(u_role[:, 0], 0, (num_frames - 3).clamp(max=config.max_keyframes))
    between = (place > 0) & (place < last)
    roles = _set_least(roles, between, u_role, keyframes[:, None], Role.CONTEXT_ACTIVE)
    roles[:, 0] = int(Role.CONTEXT_ACTIVE)
    return torch.where(place == last, int(Role.CONTEXT_PASSIVE), roles)


def _completion(num_frames: Tensor, u_role: Tensor, config: RoleConfig) -> Tensor:
    """Scene completion: random runs of frames are context.

    The clip is cut at k positions into pieces that are alternately context and generated. k is uniform from 1 to
    ``min(max_cuts, n - 1)``, all choices of k positions are equally likely, and the first piece is context with
    probability 1/2. The frames of a context run are passive except its last, which is active unless it ends the clip.
    Frame 0 is the only start frame, if it is not context.
    """
    roles, place = _blank_roles(num_frames, u_role), torch.arange(u_role.shape[1])
    most = (num_frames - 1).clamp(max=config.max_cuts)
    choice = _uniform_count(u_role[:, 0], 0, 2 * most - 1)  # encodes the number of cuts and whether context is first
    cuts, first_is_given = 1 + choice // 2, choice % 2
    inside = place < num_frames[:, None]
    is_cut = _set_least(torch.zeros_like(roles), inside & (place > 0), u_role, cuts[:, None], Role.FREE) == Role.FREE
    given = ((is_cut.cumsum(dim=1) + first_is_given[:, None]) % 2 == 1) & inside
    generated_follows = torch.cat([~given[:, 1:] & inside[:, 1:], torch.zeros_like(given[:, :1])], dim=1)
    context = torch.where(generated_follows, int(Role.CONTEXT_ACTIVE), int(Role.CONTEXT_PASSIVE))
    roles[:, 0] = int(Role.START)
    return torch.where(given, context, roles)


TASKS: tuple[Task, ...] = (
    Task("t2v", _text_to_video, min_frames=1),
    Task("i2v", _image_to_video, min_frames=2),
    Task("v2v", _video_to_video, min_frames=2),
    Task("interpolation", _interpolation, min_frames=3),
    Task("completion", _completion, min_frames=2),
)
"""Every task; the index is the task's number."""

TASK_NUMBERS: dict[str, int] = {task.name: number for number, task in enumerate(TASKS)}
_FALLBACK = TASK_NUMBERS["t2v"]


def task_number(name: str) -> int:
    """The number of a task.

    Raises:
        ConfigError: If the name is unknown; the message lists the known tasks.
    """
    one_of(TASK_NUMBERS).check("task", name)
    return TASK_NUMBERS[name]


def played_task(task: Tensor, num_frames: Tensor) -> Tensor:
    """The effective task of each clip: ``task``, or text-to-video if the clip is too short for it.

    Args:
        task: int64 [B], the requested tasks.
        num_frames: int64 [B].

    Returns:
        int64 [B].
    """
    least = torch.tensor([law.min_frames for law in TASKS])
    return torch.where(num_frames < least[task], _FALLBACK, task)


def draw_roles(task: Tensor, num_frames: Tensor, u_role: Tensor, config: RoleConfig) -> Tensor:
    """Draw the role of every frame of a batch of clips.

    A clip too short for its task gets the roles of text-to-video (see ``played_task``).

    Args:
        task: int64 [B], task numbers.
        num_frames: int64 [B], each at least 1.
        u_role: [B, N], independent uniforms in [0, 1).
        config: Numbers of start and context frames; text-to-video has at least one start frame, frame 0.

    Returns:
        int64 [B, N], a ``Role`` for each frame.
    """
    roles = torch.full(u_role.shape, int(Role.ABSENT), dtype=torch.int64)
    played = played_task(task, num_frames)
    for number, law in enumerate(TASKS):
        rows = torch.nonzero(played == number).flatten()
        if len(rows):
            roles[rows] = law.draw(num_frames[rows], u_role[rows], config)
    return roles
