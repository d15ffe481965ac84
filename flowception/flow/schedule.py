"""Insertion schedules: the fraction ``kappa(t)`` of free frames that exist at clock ``t``.

``kappa`` is an increasing map of [0, 1] onto [0, 1] with ``kappa(0) = 0`` and ``kappa(1) = 1``. A free frame's delay
is ``kappa^-1(U)`` with ``U ~ Unif(0, 1)``, so it is visible at clock ``t`` with probability ``kappa(t)``. A frame that
is still missing appears at rate ``kappa'(t) / (1 - kappa(t))``, the hazard (docs/method.md).

All methods are elementwise on tensors of any shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowception.ranges import number, one_of


class InsertionSchedule(ABC):
    """An increasing map kappa of [0, 1] onto itself."""

    @abstractmethod
    def kappa(self, t: Tensor) -> Tensor:
        """Fraction of free frames that exist at clock ``t`` in [0, 1]."""

    @abstractmethod
    def kappa_dot(self, t: Tensor) -> Tensor:
        """Derivative of ``kappa`` at ``t``."""

    @abstractmethod
    def inverse(self, u: Tensor) -> Tensor:
        """The clock at which ``kappa`` is ``u``."""

    def hazard(self, t: Tensor) -> Tensor:
        """Rate at which a missing frame appears at ``t``; infinite for ``t >= 1``."""
        return torch.where(t < 1, self.kappa_dot(t) / (1 - self.kappa(t)), torch.inf)

    @abstractmethod
    def mean(self) -> float:
        """Integral of ``kappa`` over [0, 1]."""

    @abstractmethod
    def mean_square(self) -> float:
        """Integral of ``kappa^2`` over [0, 1]."""

    def appearance_probability(self, step: int, num_steps: int) -> float:
        """Probability that a frame missing at clock ``step / num_steps`` appears within the next step.

        Args:
            step: Steps made so far, 0 to ``num_steps - 1``.
            num_steps: Steps from clock 0 to clock 1.

        Returns:
            ``(kappa(t + h) - kappa(t)) / (1 - kappa(t))``, exactly 1 in the last step.

        Raises:
            ValueError: If ``step`` is out of range.
        """
        if not 0 <= step < num_steps:
            raise ValueError(
                f"step must be in [0, {num_steps - 1}], got {step}; frames are inserted in these steps only"
            )
        if step == num_steps - 1:
            return 1.0
        now, then = self.kappa(torch.tensor([step / num_steps, (step + 1) / num_steps], dtype=torch.float64)).tolist()
        return (then - now) / (1 - now)


class LinearSchedule(InsertionSchedule):
    """``kappa(t) = t``."""

    def kappa(self, t: Tensor) -> Tensor:
        """``t``."""
        return t

    def kappa_dot(self, t: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(t)

    def inverse(self, u: Tensor) -> Tensor:
        """``u``."""
        return u

    def mean(self) -> float:
        """1 / 2."""
        return 1 / 2

    def mean_square(self) -> float:
        """1 / 3."""
        return 1 / 3


class PowerSchedule(InsertionSchedule):
    """``kappa(t) = t^a``: late insertion for a > 1, early for a < 1."""

    def __init__(self, exponent: float) -> None:
        number(above=0).check("insertion_exponent", exponent)
        self.exponent = exponent

    def kappa(self, t: Tensor) -> Tensor:
        """``t^a``."""
        return t**self.exponent

    def kappa_dot(self, t: Tensor) -> Tensor:
        """``a t^(a - 1)``."""
        return self.exponent * t ** (self.exponent - 1)

    def inverse(self, u: Tensor) -> Tensor:
        """``u^(1 / a)``."""
        return u ** (1 / self.exponent)

    def mean(self) -> float:
        """1 / (a + 1)."""
        return 1 / (self.exponent + 1)

    def mean_square(self) -> float:
        """1 / (2 a + 1)."""
        return 1 / (2 * self.exponent + 1)


class CosineSchedule(InsertionSchedule):
    """``kappa(t) = (1 - cos(pi t)) / 2``, computed as ``sin^2(pi t / 2)`` so that both ends are exact."""

    def kappa(self, t: Tensor) -> Tensor:
        """``sin^2(pi t / 2)``."""
        return torch.sin(math.pi / 2 * t) ** 2

    def kappa_dot(self, t: Tensor) -> Tensor:
        """``(pi / 2) sin(pi t)``."""
        return math.pi / 2 * torch.sin(math.pi * t)

    def inverse(self, u: Tensor) -> Tensor:
        """``(2 / pi) arcsin(sqrt(u))``."""
        return 2 / math.pi * torch.asin(torch.sqrt(u))

    def hazard(self, t: Tensor) -> Tensor:
        """``pi tan(pi t / 2)``, which avoids the cancellation in ``1 - kappa``.

        The second half uses ``pi / tan(pi (1 - t) / 2)`` instead: pi / 2 rounded to float32 is past the pole, where the
        tangent is negative.
        """
        early, late = torch.tan(math.pi / 2 * t), 1 / torch.tan(math.pi / 2 * (1 - t).clamp(min=0))
        return math.pi * torch.where(t < 0.5, early, late)

    def mean(self) -> float:
        """1 / 2."""
        return 1 / 2

    def mean_square(self) -> float:
        """3 / 8."""
        return 3 / 8


INSERTION_SCHEDULES = ("linear", "power", "cosine")


def build_schedule(name: str, exponent: float = 2.0) -> InsertionSchedule:
    """Build an insertion schedule by name.

    Args:
        name: One of ``INSERTION_SCHEDULES`` (config key ``insertion_schedule``).
        exponent: a of the power schedule (config key ``insertion_exponent``); other schedules ignore it.

    Returns:
        The schedule.

    Raises:
        ConfigError: If the name is unknown or the exponent is not positive.
    """
    one_of(INSERTION_SCHEDULES).check("insertion_schedule", name)
    if name == "linear":
        return LinearSchedule()
    if name == "power":
        return PowerSchedule(exponent)
    return CosineSchedule()
