"""Delay laws: when each frame of a clip appears. Every baseline is a delay law; there is no second engine.

A frame with delay ``u`` has time ``tau_g - u`` at global time ``tau_g`` (docs/method.md):

* ``uniform``: Flowception. The model learns where frames are missing.
* ``random``, ``left_to_right``, ``hierarchical``: the same delays, assigned randomly, left to right, or coarse to
  fine. The number of visible frames at any time is distributed as under ``uniform``; only the choice of frames differs.
* ``full_sequence``: all frames at once.
* ``autoregressive``: one frame after another.

All but the first are prescribed: the length is an input, there is no insertion loss, and the sampler replays delays
drawn from the law. Context frames have delay 0 under every law, and their time input is ``clip(tau_g, 0, 1)``. Only
insertion depends on the clock, and prescribed laws do not insert, so under ``autoregressive`` the clock may stay at 1
from the second frame on.

To add a law, subclass ``DelayLaw``, register it in ``DELAY_LAWS``, and test its delays, visible frames and counts.

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
    """Distribution of delays, and the range of global times."""

    inserts: bool = False
    """Whether the model's rate inserts frames. A prescribed law has no insertion loss."""
    two_part: bool = False
    """Whether the clock ends at 2 with a two-part prior (``insertion_share``). Otherwise the prior is uniform, with
    weight 1."""

    @abstractmethod
    def clock_end(self, roles: Tensor) -> Tensor:
        """Global time at which every frame of a clip reaches 1, float64 [B], for adapted roles [B, N]."""

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """Roles under this law, int64 [B, N], from the task's roles."""
        return roles

    @abstractmethod
    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """Delay of each frame, float64 [B, N]; infinite for padding.

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
            insertion_share: Fraction of times below 1; laws without a two-part prior ignore it.

        Returns:
            ``tau_g`` [B] and weights [B].
        """
        if self.two_part:
            return two_part_prior(u_time, insertion_share)
        return u_time * self.clock_end(roles), torch.ones_like(u_time)

    def uniform_of(self, global_time: Tensor, roles: Tensor, insertion_share: float) -> Tensor:
        """Inverse of ``global_time``: the uniforms for given times, [B]; >= 1 for times outside its range."""
        if self.two_part:
            return two_part_uniform(global_time, insertion_share)
        return global_time / self.clock_end(roles)


def rank_among(mask: Tensor, key: Tensor) -> Tensor:
    """Rank of each frame among the masked frames of its clip, by ascending key; ties are ordered left to right.

    Args:
        mask: bool [B, N].
        key: [B, N].

    Returns:
        int64 [B, N]; undefined where ``mask`` is false.
    """
    order = torch.argsort(torch.where(mask, key.double(), torch.inf), dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def _present(roles: Tensor) -> Tensor:
    return roles != Role.ABSENT


class Uniform(DelayLaw):
    """Flowception: free frames have delay ``kappa^-1(U)``, all others 0."""

    inserts = True
    two_part = True

    def clock_end(self, roles: Tensor) -> Tensor:
        """2: the last frame may be inserted at 1 and takes 1 to denoise."""
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
    """The uniform law's delays, prescribed: the model trains on the same states without a rate."""

    inserts = False


class Ordered(RandomOrder):
    """The uniform law's delays assigned in an order: the n-th frame in the order gets the n-th smallest delay."""

    @abstractmethod
    def place_in_order(self, frames: Tensor) -> Tensor:
        """Sort key of each frame index, int64, any shape; frames with equal keys are ordered randomly."""

    def _places(self, roles: Tensor) -> Tensor:
        return self.place_in_order(torch.arange(roles.shape[1])).expand_as(roles).double()

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """The same number of start frames as the task, moved to the first generated frames in the order."""
        generated, starts = is_generated(roles), (roles == Role.START).sum(dim=1, keepdim=True)
        is_start = rank_among(generated, self._places(roles)) < starts
        return torch.where(generated, torch.where(is_start, int(Role.START), int(Role.FREE)), roles)

    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """Order statistics of ``kappa^-1(U)``. The same uniforms break ties in the order, independently of them."""
        unordered, free = super().delays(roles, u_delay, schedule), roles == Role.FREE
        ascending = torch.where(free, unordered, torch.inf).sort(dim=1).values
        rank = rank_among(free, self._places(roles) + u_delay.double())
        return torch.where(free, ascending.gather(1, rank), unordered)


class LeftToRight(Ordered):
    """Frames appear from left to right."""

    def place_in_order(self, frames: Tensor) -> Tensor:
        """The index itself."""
        return frames


class Hierarchical(Ordered):
    """Coarse to fine: frame 0, then multiples of the largest power of 2, of the next, ..., odd frames last."""

    def place_in_order(self, frames: Tensor) -> Tensor:
        """Minus the number of times 2 divides the index; frame 0 comes first."""
        twos = torch.log2((frames & -frames).double())
        return torch.where(frames == 0, -64, -twos).to(torch.int64)


class FullSequence(DelayLaw):
    """Full-sequence flow matching: every generated frame is a start frame."""

    def clock_end(self, roles: Tensor) -> Tensor:
        """1: all frames denoise together."""
        return torch.ones(len(roles), dtype=torch.float64)

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """Free frames become start frames."""
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
    """Frame by frame: each generated frame appears when the previous one reaches 1 (``u_i = i`` without context)."""

    def clock_end(self, roles: Tensor) -> Tensor:
        """g: each generated frame takes 1."""
        return is_generated(roles).sum(dim=1).double()

    def adapt_roles(self, roles: Tensor) -> Tensor:
        """Only the first generated frame is a start frame."""
        generated = is_generated(roles)
        first = generated & (generated.cumsum(dim=1) == 1)
        return torch.where(generated, torch.where(first, int(Role.START), int(Role.FREE)), roles)

    def delays(self, roles: Tensor, u_delay: Tensor, schedule: InsertionSchedule) -> Tensor:
        """Number of generated frames to the left."""
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
    """The delay law for config key ``delay_law``.

    Raises:
        ConfigError: If the name is unknown.
    """
    one_of(DELAY_LAWS).check("delay_law", name)
    return DELAY_LAWS[name]
