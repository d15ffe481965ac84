"""Extended time: a global time and one delay per frame determine which frames are visible, and how noisy each is.

``tau_i = tau_g - u_i``. ``tau_i < 0``: deleted, not in the input. ``0 <= tau_i < 1``: flow. ``tau_i >= 1``: terminal.
The delay law sets the range of the clock and the prior of ``tau_g`` (``delays``, ``prior``).

Everything here is a deterministic function of uniforms drawn by the caller, vectorized over clips.

Shape legend: ``B`` clips, ``N`` frames of the longest clip. Tensors are on the CPU, floats are float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception.errors import ConfigError
from flowception.flow.context_law import present_law
from flowception.flow.delays import build_delay_law
from flowception.flow.path import shift_time
from flowception.flow.schedule import InsertionSchedule, build_schedule
from flowception.flow.task import (
    TASKS,
    RoleConfig,
    draw_roles,
    is_context,
    is_generated,
    may_insert,
    played_task,
    task_number,
)
from flowception.ranges import check_ranges, number


@dataclass(kw_only=True)
class ProcessConfig(RoleConfig):
    """The generative process that a model learns."""

    tasks: dict[str, float] = field(default_factory=lambda: {"t2v": 1.0}, metadata={"replaced": True})
    """Probability of each task (``t2v``, ``i2v``, ``v2v``, ``interpolation``, ``completion``); need not sum to 1."""
    insertion_schedule: str = "linear"
    """kappa: ``linear``, ``power`` or ``cosine``."""
    insertion_exponent: float = 2.0
    """Exponent of the ``power`` schedule."""
    insertion_share: float = 0.5
    """Fraction of global times below 1, in (0, 1]. 0.5 matches the sampler. Larger values save FLOPs but increase
    variance. 1 trains no state after the end of the clock, which is a different objective. ``full_sequence`` and
    ``autoregressive`` have a different clock and ignore it."""
    time_shift: float = 1.0
    """s of the time shift, at least 1 (3 for LTX latents)."""
    delay_law: str = "uniform"
    """``uniform`` is Flowception. Baselines with a given length: ``full_sequence`` (all frames at once),
    ``autoregressive`` (one frame after another), and insertion in a prescribed order: ``left_to_right``,
    ``hierarchical`` or ``random``."""
    insertion_loss_weight: float = 0.1
    """Weight of the insertion loss. The velocity loss is a mean per element, about 1. The insertion loss has gradient
    ``lambda - k``, which is several frames in magnitude, so 0.1 puts both on the same scale. The weight does not move
    the optimum if the network can fit both."""
    condition_dropout: float = 0.1
    """Probability of dropping a clip's class and text in training, for classifier-free guidance."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.task_probabilities()
        build_schedule(self.insertion_schedule, self.insertion_exponent)
        build_delay_law(self.delay_law)
        rules = {
            "insertion_share": number(above=0, at_most=1),
            "time_shift": number(at_least=1),
            "insertion_loss_weight": number(at_least=0),
            "condition_dropout": number(at_least=0, at_most=1),
        }
        check_ranges("", self, rules)

    def schedule(self) -> InsertionSchedule:
        """The insertion schedule kappa."""
        return build_schedule(self.insertion_schedule, self.insertion_exponent)

    def task_probabilities(self) -> NDArray[np.float64]:
        """Probability of each entry of ``TASKS``; the order of the config's keys does not matter."""
        share = np.zeros(len(TASKS))
        for name, value in self.tasks.items():
            number(at_least=0).check(f"tasks.{name}", value)
            share[task_number(name)] = value
        if not share.sum() > 0:
            raise ConfigError(f"tasks must contain a probability > 0, got {dict(self.tasks)}")
        return share / share.sum()


@dataclass(frozen=True, kw_only=True)
class ClipDraws:
    """All random draws of a batch of clips, made by ``draw_clips``."""

    num_frames: Tensor
    """int64 [B]."""
    global_time: Tensor
    """[B], tau_g."""
    weight: Tensor
    """[B], importance weight of the clip's losses."""
    task: Tensor
    """int64 [B], task number of each clip, after any fallback to t2v."""
    roles: Tensor
    """int64 [B, N], a ``Role`` for each frame."""
    delay: Tensor
    """[B, N], u; infinite for padding."""
    time_shift: float
    """s of the time shift."""
    inserts: bool
    """Whether the delay law has an insertion loss."""

    @cached_property
    def frame_time(self) -> Tensor:
        """[B, N], ``tau_g - u``; minus infinity for padding."""
        return self.global_time[:, None] - self.delay

    @cached_property
    def visible(self) -> Tensor:
        """Frames in the model's input, bool [B, N]."""
        return self.frame_time >= 0

    @cached_property
    def visible_frames(self) -> Tensor:
        """int64 [B], number of visible frames."""
        return self.visible.sum(dim=1)

    @cached_property
    def missing(self) -> Tensor:
        """int64 [B, N], deleted frames between a visible frame and the next visible one, or the end; 0 elsewhere."""
        place = torch.arange(self.roles.shape[1]).expand_as(self.roles)
        end = self.num_frames[:, None]
        following = torch.where(self.visible, place, end)
        from_here = following.flip(1).cummin(dim=1).values.flip(1)
        next_visible = torch.cat([from_here[:, 1:], end], dim=1)
        return torch.where(self.visible, next_visible - place - 1, 0)

    @cached_property
    def flow_mask(self) -> Tensor:
        """Frames with a velocity loss: visible generated frames in flow state, bool [B, N]."""
        return self.visible & is_generated(self.roles) & (self.frame_time < 1)

    @cached_property
    def insertion_mask(self) -> Tensor:
        """Frames with an insertion loss: visible frames that may insert, while ``tau_g < 1``, bool [B, N]."""
        if not self.inserts:
            return torch.zeros_like(self.visible)
        return self.visible & may_insert(self.roles) & (self.global_time < 1)[:, None]

    @cached_property
    def shown_time(self) -> Tensor:
        """[B, N], time input of each frame: its shifted time (noise level) if generated, the clock if context."""
        own = shift_time(self.frame_time.clamp(0, 1), self.time_shift)
        return torch.where(is_context(self.roles), self.global_time.clamp(0, 1)[:, None], own)


def _draw_tasks(config: ProcessConfig, u_task: Tensor) -> Tensor:
    edges = torch.from_numpy(np.cumsum(config.task_probabilities())[:-1])
    return torch.searchsorted(edges, u_task.contiguous(), right=True)


def draw_clips(
    config: ProcessConfig,
    num_frames: Tensor | NDArray[np.int64],
    u_time: Tensor | NDArray[np.float64],
    u_task: Tensor | NDArray[np.float64],
    u_frame: Tensor | NDArray[np.float64],
) -> ClipDraws:
    """Draw the task, roles, delays and global time of a batch of clips.

    Args:
        config: The process.
        num_frames: [B], latent frames of each clip, at least 1.
        u_time: [B], uniforms in [0, 1) for the global time (stratified by the caller or not).
        u_task: [B], uniforms for the task.
        u_frame: [B, N, 2], uniforms of each frame: column 0 for its delay, column 1 for its role.

    Returns:
        The draws. Those of a clip depend only on its own uniforms.

    Raises:
        ValueError: If the shapes are inconsistent or a clip has no frame.
    """
    frames = torch.as_tensor(num_frames, dtype=torch.int64)
    time, which = torch.as_tensor(u_time, dtype=torch.float64), torch.as_tensor(u_task, dtype=torch.float64)
    per_frame = torch.as_tensor(u_frame, dtype=torch.float64)
    longest = int(frames.max()) if len(frames) else 0
    if time.shape != frames.shape or which.shape != frames.shape or per_frame.shape[::2] != (len(frames), 2):
        raise ValueError(
            "num_frames, u_time, u_task and u_frame must have shapes [B], [B], [B] and [B, N, 2], got "
            f"{tuple(frames.shape)}, {tuple(time.shape)}, {tuple(which.shape)} and {tuple(per_frame.shape)}"
        )
    if len(frames) and (longest > per_frame.shape[1] or int(frames.min()) < 1):
        raise ValueError(
            f"num_frames must be in [1, {per_frame.shape[1]}] (the upper bound is N of u_frame), got values from "
            f"{int(frames.min())} to {longest}"
        )
    law = build_delay_law(config.delay_law)
    task = _draw_tasks(config, which)
    roles = law.adapt_roles(draw_roles(task, frames, per_frame[..., 1], config))
    global_time, weight = law.global_time(time, roles, config.insertion_share)
    return ClipDraws(
        num_frames=frames,
        global_time=global_time,
        weight=weight,
        task=played_task(task, frames),
        roles=roles,
        delay=law.delays(roles, per_frame[..., 0], config.schedule()),
        time_shift=config.time_shift,
        inserts=law.inserts,
    )


def expected_attention_ratio(
    config: ProcessConfig,
    num_frames: Tensor | NDArray[np.int64] | Mapping[int, int],
    tokens_per_frame: Tensor | NDArray[np.signedinteger] | None = None,
) -> float:
    """Expected pairs of visible frames, relative to full-sequence training on the same clips.

    This is the relative cost of full attention. Other patterns have fewer pairs in both numerator and denominator.

    Args:
        config: The process.
        num_frames: [B], latent frames of each clip, or a map from length to number of clips.
        tokens_per_frame: [B], tokens per frame of each clip; None if all clips have the same frame size.

    Returns:
        ``E[sum (visible p)^2] / sum (n p)^2``, with p tokens per frame, under the configured prior. Exact: summed over
        the distribution of the number of frames present at clock 0 (``context_law.present_law``).

    Raises:
        ValueError: If there are no clips, or ``tokens_per_frame`` is given with a map.
    """
    if isinstance(num_frames, Mapping):
        if tokens_per_frame is not None:
            raise ValueError(
                "tokens_per_frame must be None if num_frames maps lengths to counts; pass the length of each clip"
            )
        lengths, pairs_weight = torch.tensor(list(num_frames.keys())), torch.tensor(list(num_frames.values()))
    else:
        frames = torch.as_tensor(num_frames, dtype=torch.int64)
        lengths, which = torch.unique(frames, return_inverse=True)
        size = torch.ones(len(frames)) if tokens_per_frame is None else torch.as_tensor(tokens_per_frame)
        pairs_weight = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, which, size.double() ** 2)
    if not len(lengths):
        raise ValueError("num_frames must contain at least one clip, got none")
    law, schedule, share = build_delay_law(config.delay_law), config.schedule(), config.insertion_share
    full = lengths.double() ** 2
    expected = torch.zeros_like(full)
    for task, probability in zip(TASKS, config.task_probabilities().tolist()):
        for place, n in enumerate(lengths.tolist() if probability else []):
            present = present_law(task.name, n, config)
            counts, chances = torch.tensor(list(present)), torch.tensor(list(present.values()), dtype=torch.float64)
            length = torch.full_like(chances, n)
            square = law.mean_square_visible(length, counts[:, 0], counts[:, 1], schedule, share)
            expected[place] += probability * (chances * square).sum()
    return float((expected * pairs_weight).sum() / (full * pairs_weight).sum())
