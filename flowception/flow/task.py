"""Tasks: which frames of a clip are given, which are there from the beginning, which are inserted later.

A task is one small function that gives every frame of a clip a ``Role`` (table in DESIGN.md section 2). To add
one, write the function, append it to ``TASKS`` and test the law of its roles; a task's number is its index there,
so never reorder the table.

Shape legend: ``B`` clips, ``N`` frames of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from flowception.errors import ConfigError
from flowception.nn.layout import ModelRole


class Role(IntEnum):
    """What a latent frame of a clip is to the process."""

    ABSENT = -1
    """Padding behind a clip's last frame."""
    START = 0
    """Present from the beginning, as noise."""
    FREE = 1
    """Inserted later."""
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


def model_role(roles: Tensor) -> Tensor:
    """What the network is told: ``ModelRole`` numbers, int64. It cannot tell a start frame from a free one.

    Args:
        roles: ``Role`` numbers, any shape. ABSENT becomes GENERATED, the neutral value of unused slots.

    Returns:
        int64, same shape.
    """
    generated = torch.full_like(roles, int(ModelRole.GENERATED), dtype=torch.int64)
    active = torch.where(roles == Role.CONTEXT_ACTIVE, int(ModelRole.ACTIVE), generated)
    return torch.where(roles == Role.CONTEXT_PASSIVE, int(ModelRole.PASSIVE), active)


RoleLaw = Callable[[Tensor, Tensor, int], Tensor]
"""``(num_frames [K], u_role [K, N], num_start_frames) -> roles [K, N]`` for K clips of one task."""


@dataclass(frozen=True)
class Task:
    """A named law of roles."""

    name: str
    draw: RoleLaw
    needs_context: bool
    """Whether its sampler must be given context frames."""


def _blank_roles(num_frames: Tensor, u_role: Tensor) -> Tensor:
    """FREE at a clip's frames, ABSENT behind them."""
    inside = torch.arange(u_role.shape[1]) < num_frames[:, None]
    return torch.where(inside, int(Role.FREE), int(Role.ABSENT))


def _start_random(roles: Tensor, u_role: Tensor, count: int) -> Tensor:
    """Make ``count`` of each clip's FREE frames START (or all there are): those of least ``u_role``."""
    free = roles == Role.FREE
    order = torch.argsort(torch.where(free, u_role, torch.inf), dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return torch.where(free & (rank < count), int(Role.START), roles)


def _text_to_video(num_frames: Tensor, u_role: Tensor, num_start_frames: int) -> Tensor:
    """No context; frame 0 and ``num_start_frames - 1`` random others start."""
    roles = _blank_roles(num_frames, u_role)
    roles[:, 0] = int(Role.START)
    return _start_random(roles, u_role, num_start_frames - 1)


def _image_to_video(num_frames: Tensor, u_role: Tensor, num_start_frames: int) -> Tensor:
    """Frame 0 is active context; ``num_start_frames`` random others start."""
    roles = _blank_roles(num_frames, u_role)
    roles[:, 0] = int(Role.CONTEXT_ACTIVE)
    return _start_random(roles, u_role, num_start_frames)


TASKS: tuple[Task, ...] = (
    Task("t2v", _text_to_video, needs_context=False),
    Task("i2v", _image_to_video, needs_context=True),
)
"""Every task; the index is the task's number."""

TASK_NUMBERS: dict[str, int] = {task.name: number for number, task in enumerate(TASKS)}
_FALLBACK = TASK_NUMBERS["t2v"]


def task_number(name: str) -> int:
    """The number of a task, or an error that lists the known ones."""
    if name not in TASK_NUMBERS:
        raise ConfigError(f"there is no task {name!r}; known tasks: {', '.join(TASK_NUMBERS)}")
    return TASK_NUMBERS[name]


def draw_roles(task: Tensor, num_frames: Tensor, u_role: Tensor, num_start_frames: int) -> Tensor:
    """Give every frame of a batch of clips its role.

    A clip that its task would leave with nothing to generate gets the roles of text-to-video
    (``played_task`` tells which).

    Args:
        task: int64 [B], task numbers.
        num_frames: int64 [B], each at least 1.
        u_role: [B, N], independent uniforms in [0, 1).
        num_start_frames: Start frames asked for; text-to-video has at least one, frame 0.

    Returns:
        int64 [B, N], a ``Role`` for each frame.
    """
    roles = torch.full(u_role.shape, int(Role.ABSENT), dtype=torch.int64)
    for number, law in enumerate(TASKS):
        rows = torch.nonzero(task == number).flatten()
        if len(rows):
            roles[rows] = law.draw(num_frames[rows], u_role[rows], num_start_frames)
    idle = torch.nonzero(~is_generated(roles).any(dim=1)).flatten()
    if len(idle):
        roles[idle] = TASKS[_FALLBACK].draw(num_frames[idle], u_role[idle], num_start_frames)
    return roles


def played_task(task: Tensor, roles: Tensor) -> Tensor:
    """The task whose roles each clip really has: ``task``, or text-to-video where it fell back.

    Args:
        task: int64 [B], the tasks asked for.
        roles: int64 [B, N], as ``draw_roles`` gave them.

    Returns:
        int64 [B].
    """
    needs_context = torch.tensor([law.needs_context for law in TASKS])
    fallen_back = needs_context[task] & ~is_context(roles).any(dim=1)
    return torch.where(fallen_back, _FALLBACK, task)
