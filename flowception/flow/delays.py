"""Delay laws: when each frame of a clip comes into being. Baselines are delay laws, never a second engine.

A frame with delay ``u`` has time ``tau_g - u`` when the global time is ``tau_g`` (DESIGN.md section 2, "Extended
time" and "Baselines are delay laws"). To add a law, subclass ``DelayLaw``, name it in ``DELAY_LAWS`` and test its
delays.

Shape legend: ``B`` clips, ``N`` frames of the longest of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowception.errors import ConfigError
from flowception.flow.schedule import InsertionSchedule
from flowception.flow.task import Role


class DelayLaw(ABC):
    """How delays are drawn, and over which global times."""

    inserts: bool
    """Whether frames are inserted by the model's rate; a prescribed law has no insertion loss."""

    @abstractmethod
    def clock_end(self, num_frames: Tensor) -> Tensor:
        """Global time at which every frame of a clip is at 1, float64 [B] for int64 [B]."""

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """The roles under this law, int64 [B, N], from those of the task."""
        return roles

    @abstractmethod
    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """Delay of each frame, float64 [B, N]; infinite where there is no frame.

        Args:
            roles: int64 [B, N], after ``adapt_roles``.
            u_delay: float64 [B, N], independent uniforms in [0, 1).
            schedule: The insertion schedule.
        """


class Uniform(DelayLaw):
    """Flowception: free frames get ``kappa^-1(U)``, all others 0."""

    inserts = True

    def clock_end(self, num_frames: Tensor) -> Tensor:
        """2: the last frame may be inserted at 1 and then takes 1."""
        return torch.full_like(num_frames, 2, dtype=torch.float64)

    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """``kappa^-1(U)`` for free frames."""
        delay = torch.where(roles == Role.FREE, schedule.inverse(u_delay.double()), 0.0)
        return torch.where(roles == Role.ABSENT, torch.inf, delay)


class FullSequence(DelayLaw):
    """Full-sequence flow matching: every frame that is not context is a start frame."""

    inserts = False

    def clock_end(self, num_frames: Tensor) -> Tensor:
        """1: all frames run together."""
        return torch.ones_like(num_frames, dtype=torch.float64)

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """Free frames start."""
        return torch.where(roles == Role.FREE, int(Role.START), roles)

    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """0 for every frame."""
        return torch.where(roles == Role.ABSENT, torch.inf, torch.zeros_like(u_delay, dtype=torch.float64))


DELAY_LAWS: dict[str, DelayLaw] = {"uniform": Uniform(), "full_sequence": FullSequence()}


def build_delay_law(name: str) -> DelayLaw:
    """The law that config key ``delay_law`` names.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in DELAY_LAWS:
        raise ConfigError(f"delay_law is {name!r}; give one of {', '.join(DELAY_LAWS)}")
    return DELAY_LAWS[name]
