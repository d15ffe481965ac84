"""Delay laws: when each frame of a clip comes into being. Baselines are delay laws, never a second engine.

A frame with delay ``u`` has time ``tau_g - u`` when the global time is ``tau_g`` (DESIGN.md section 2, "Extended
time" and "Baselines are delay laws"):

* ``uniform``: Flowception. The model learns where frames are missing.
* ``random``, ``left_to_right``, ``hierarchical``: the same delays, in any order, left to right, or coarse to fine. A
  clip has as many visible frames as under ``uniform`` at every time; only which ones differs.
* ``full_sequence``: all frames at once.
* ``autoregressive``: one frame after the other.

All but the first are prescribed: the length is given, there is no insertion loss, and the sampler replays delays drawn
from the law. Context frames have delay 0 under every law and are shown ``clip(tau_g, 0, 1)``: the clock matters to
insertion alone, which a prescribed law leaves out, so under ``autoregressive`` it may stand at 1 from the second frame
on.

To add a law, subclass ``DelayLaw``, name it in ``DELAY_LAWS`` and test its delays, its visible frames and its counts.

Shape legend: ``B`` clips, ``N`` frames of the longest of them, ``c`` context and ``g`` generated frames of a clip.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowception.flow.prior import two_part_prior, two_part_uniform
from flowception.flow.schedule import InsertionSchedule
from flowception.flow.task import Role, is_generated
from flowception.ranges import one_of


class DelayLaw(ABC):
    """How delays are drawn, and over which global times."""

    inserts: bool = False
    """Whether frames are inserted by the model's rate; a prescribed law has no insertion loss."""
    two_part: bool = False
    """Whether the clock ends at 2 and its prior has two parts (``insertion_share``); else it is uniform, unweighted."""

    @abstractmethod
    def clock_end(self, roles: Tensor) -> Tensor:
        """Global time at which every frame of a clip is at 1, float64 [B] for adapted roles [B, N]."""

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

    @abstractmethod
    def mean_square_visible(
        self, num_frames: Tensor, context: Tensor, starts: Tensor, schedule: InsertionSchedule, insertion_share: float
    ) -> Tensor:
        """Expected square of the number of visible frames under the prior, float64 [B].

        Args:
            num_frames: [B], n.
            context: [B], c.
            starts: [B], start frames of the task, before ``adapt_roles``.
            schedule: The insertion schedule.
            insertion_share: Share of times below 1.
        """

    def global_time(self, u_time: Tensor, roles: Tensor, insertion_share: float) -> tuple[Tensor, Tensor]:
        """Global times and importance weights.

        Args:
            u_time: float64 [B], uniforms in [0, 1).
            roles: int64 [B, N], after ``adapt_roles``.
            insertion_share: Share of times below 1; laws without a two-part prior ignore it.

        Returns:
            ``tau_g`` [B] and weights [B].
        """
        if self.two_part:
            return two_part_prior(u_time, insertion_share)
        return u_time * self.clock_end(roles), torch.ones_like(u_time)

    def uniform_of(self, global_time: Tensor, roles: Tensor, insertion_share: float) -> Tensor:
        """The uniforms that ``global_time`` turns into given times, [B]; at least 1 for times it never gives."""
        if self.two_part:
            return two_part_uniform(global_time, insertion_share)
        return global_time / self.clock_end(roles)


def rank_among(mask: Tensor, key: Tensor) -> Tensor:
    """Rank of each frame among those of its clip that ``mask`` keeps, by ascending key; ties go to the left.

    Args:
        mask: bool [B, N].
        key: [B, N].

    Returns:
        int64 [B, N]; has no meaning where ``mask`` is false.
    """
    order = torch.argsort(torch.where(mask, key.double(), torch.inf), dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def _present(roles: Tensor) -> Tensor:
    return roles != Role.ABSENT


class Uniform(DelayLaw):
    """Flowception: free frames get ``kappa^-1(U)``, all others 0."""

    inserts = True
    two_part = True

    def clock_end(self, roles: Tensor) -> Tensor:
        """2: the last frame may be inserted at 1 and then takes 1."""
        return torch.full((len(roles),), 2.0, dtype=torch.float64)

    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """``kappa^-1(U)`` for free frames."""
        delay = torch.where(roles == Role.FREE, schedule.inverse(u_delay.double()), 0.0)
        return torch.where(_present(roles), delay, torch.inf)

    def mean_square_visible(
        self, num_frames: Tensor, context: Tensor, starts: Tensor, schedule: InsertionSchedule, insertion_share: float
    ) -> Tensor:
        """``E[(n - f + Binomial(f, kappa(tau_g)))^2]`` below 1, f free frames; ``n^2`` above."""
        present, mean, square = (context + starts).double(), schedule.mean(), schedule.mean_square()
        free = num_frames - present
        early = present**2 + 2 * present * free * mean + free * (mean - square) + free**2 * square
        return insertion_share * early + (1 - insertion_share) * num_frames**2


class RandomOrder(Uniform):
    """The uniform law's delays, prescribed: the model is trained on the same states, and never asked for a rate."""

    inserts = False


class Ordered(RandomOrder):
    """The uniform law's delays dealt out in an order: the frame that is n-th in it gets the n-th least delay."""

    @abstractmethod
    def place_in_order(self, frames: Tensor) -> Tensor:
        """Whole number for each frame index, int64, any shape; frames of equal number come in random order."""

    def _places(self, roles: Tensor) -> Tensor:
        return self.place_in_order(torch.arange(roles.shape[1])).expand_as(roles).double()

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """As many start frames as the task has, the first generated ones of the order."""
        generated, starts = is_generated(roles), (roles == Role.START).sum(dim=1, keepdim=True)
        begins = rank_among(generated, self._places(roles)) < starts
        return torch.where(generated, torch.where(begins, int(Role.START), int(Role.FREE)), roles)

    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """Order statistics of ``kappa^-1(U)``; the same uniforms break ties of the order, independently of them."""
        own, free = super().delays(roles, u_delay, schedule), roles == Role.FREE
        ascending = torch.where(free, own, torch.inf).sort(dim=1).values
        rank = rank_among(free, self._places(roles) + u_delay.double())
        return torch.where(free, ascending.gather(1, rank), own)


class LeftToRight(Ordered):
    """Frames appear from left to right."""

    def place_in_order(self, frames: Tensor) -> Tensor:
        """The index itself."""
        return frames


class Hierarchical(Ordered):
    """Coarse to fine: frame 0, then multiples of the largest power of 2, of the next, ..., odd frames last."""

    def place_in_order(self, frames: Tensor) -> Tensor:
        """Minus the number of times that 2 divides the index; frame 0 before all."""
        twos = torch.log2((frames & -frames).double())
        return torch.where(frames == 0, -64, -twos).to(torch.int64)


class FullSequence(DelayLaw):
    """Full-sequence flow matching: every frame that is not context is a start frame."""

    def clock_end(self, roles: Tensor) -> Tensor:
        """1: all frames run together."""
        return torch.ones(len(roles), dtype=torch.float64)

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """Free frames start."""
        return torch.where(roles == Role.FREE, int(Role.START), roles)

    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """0 for every frame."""
        return torch.where(_present(roles), torch.zeros_like(u_delay, dtype=torch.float64), torch.inf)

    def mean_square_visible(
        self, num_frames: Tensor, context: Tensor, starts: Tensor, schedule: InsertionSchedule, insertion_share: float
    ) -> Tensor:
        """``n^2``."""
        return num_frames.double() ** 2


class Autoregressive(DelayLaw):
    """Frame by frame: a generated frame begins when the one before it has finished (``u_i = i`` without context)."""

    def clock_end(self, roles: Tensor) -> Tensor:
        """g: each generated frame takes 1."""
        return is_generated(roles).sum(dim=1).double()

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """Only the first generated frame starts."""
        generated = is_generated(roles)
        first = generated & (generated.cumsum(dim=1) == 1)
        return torch.where(generated, torch.where(first, int(Role.START), int(Role.FREE)), roles)

    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """Number of generated frames on the left."""
        generated = is_generated(roles)
        delay = torch.where(generated, generated.cumsum(dim=1) - 1, 0).double()
        return torch.where(_present(roles), delay, torch.inf)

    def mean_square_visible(
        self, num_frames: Tensor, context: Tensor, starts: Tensor, schedule: InsertionSchedule, insertion_share: float
    ) -> Tensor:
        """Mean of ``(c + k)^2`` over k = 1 ... g."""
        c = context.double()
        g = num_frames - c
        return c**2 + c * (g + 1) + (g + 1) * (2 * g + 1) / 6


DELAY_LAWS: dict[str, DelayLaw] = {
    "uniform": Uniform(),
    "full_sequence": FullSequence(),
    "autoregressive": Autoregressive(),
    "left_to_right": LeftToRight(),
    "hierarchical": Hierarchical(),
    "random": RandomOrder(),
}

PRESCRIBED_LAWS = tuple(name for name, law in DELAY_LAWS.items() if not law.inserts)


def build_delay_law(name: str) -> DelayLaw:
    """The law that config key ``delay_law`` names.

    Raises:
        ConfigError: If there is none of that name.
    """
    one_of(DELAY_LAWS).check("delay_law", name)
    return DELAY_LAWS[name]
