"""The sampler's inputs, the state that a predictor sees, and the result.

Shape legend: ``B`` clips, ``F`` frames of all clips, concatenated: clip b is ``cu_frames[b] : cu_frames[b + 1]``;
``C H W`` a latent frame. ``N`` is ``num_inference_steps``. Frames are on the sampler's device, all else on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowception.errors import ConfigError
from flowception.flow.delays import PRESCRIBED_LAWS, build_delay_law
from flowception.flow.insertion import INSERTION_RULES
from flowception.flow.noise import MAX_SLOTS, fresh_noise
from flowception.flow.path import shift_time
from flowception.flow.prescribed import ClipPlan, plan_clip
from flowception.flow.schedule import InsertionSchedule, build_schedule
from flowception.flow.task import Role, is_context, is_generated, may_insert
from flowception.ranges import check_ranges, integer, number, one_of

ORDERS = ("learned", *PRESCRIBED_LAWS)


@dataclass(kw_only=True)
class SamplerConfig:
    """How clips are sampled."""

    num_inference_steps: int = 50
    """N, steps from clock 0 to clock 1; a clip takes at most 2 N steps (more for ``autoregressive``)."""
    num_start_frames: int = 3
    """Generated frames present at clock 0; at least one without context."""
    insertion: str | None = "thinning"
    """``thinning``, ``bernoulli`` (the paper's) or ``poisson``. None disables insertion: full-sequence sampling of
    ``num_start_frames`` frames."""
    order: str = "learned"
    """``learned``: the predictor's rates insert frames. Otherwise a prescribed delay law, whose delays are replayed:
    ``random``, ``hierarchical``, ``left_to_right``, ``full_sequence``, ``autoregressive`` (N evaluations a frame)."""
    num_frames: int | None = None
    """Length of every clip, context included, for a prescribed order; None for the learned order, where the model
    chooses the length."""
    insertion_schedule: str = "linear"
    """kappa: ``linear``, ``power`` or ``cosine``; the same as in training."""
    insertion_exponent: float = 2.0
    """Exponent of the ``power`` schedule."""
    max_frames: int = 64
    """Maximum frames of a clip. Insertions beyond it are dropped with a warning."""
    time_shift: float = 1.0
    """s of the time shift; the same as in training."""
    record_history: bool = False
    """Whether the result holds a ``StepRecord`` of every state."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        build_schedule(self.insertion_schedule, self.insertion_exponent)
        rules = {
            "num_inference_steps": integer(at_least=1),
            "num_start_frames": integer(at_least=0),
            "insertion": one_of(INSERTION_RULES).or_null("full-sequence sampling"),
            "order": one_of(ORDERS),
            "num_frames": integer(at_least=1).or_null("the learned order"),
            "max_frames": integer(at_least=1, at_most=MAX_SLOTS),
            "time_shift": number(at_least=1),
        }
        check_ranges("", self, rules)

    def schedule(self) -> InsertionSchedule:
        """The insertion schedule kappa."""
        return build_schedule(self.insertion_schedule, self.insertion_exponent)


@dataclass(kw_only=True)
class Context:
    """The context frames of one clip, in order."""

    frames: Tensor
    """[K, C, H, W], clean latents, K at least 1."""
    active: Sequence[bool] | Tensor | None = None
    """[K], whether frames may be inserted to the right of each frame. None: only right of the last frame, as in
    continuation, or image-to-video if K is 1."""
    num_start_frames: int | None = None
    """Start frames to the right of the context; None uses the sampler's."""
    begins_with_start: bool = False
    """Whether there is an additional start frame left of the context: scene completion without frame 0."""
    places: Sequence[int] | None = None
    """[K], index of each frame in the finished clip, for prescribed orders; None: the first K. The learned order
    ignores it, because the model chooses how many frames to insert between context frames."""

    def roles(self) -> Tensor:
        """CONTEXT_ACTIVE or CONTEXT_PASSIVE for each frame, int64 [K].

        Raises:
            ConfigError: If ``frames`` or ``active`` has the wrong shape.
        """
        if self.frames.ndim != 4 or not len(self.frames):
            raise ConfigError(f"context frames must have shape [K, C, H, W], K >= 1, got {tuple(self.frames.shape)}")
        if self.active is None:
            active = torch.arange(len(self.frames)) == len(self.frames) - 1
        else:
            active = torch.as_tensor(self.active, dtype=torch.bool)
        if len(active) != len(self.frames):
            raise ConfigError(
                f"Context.active must have one entry per context frame, got {len(active)} for {len(self.frames)} frames"
            )
        return torch.where(active, int(Role.CONTEXT_ACTIVE), int(Role.CONTEXT_PASSIVE))


@dataclass(frozen=True, kw_only=True)
class SamplerState:
    """All clips at one moment. A predictor reads it; ``sample_states`` yields it."""

    frames: Tensor
    """float32 [F, C, H, W]: noisy, or clean for context."""
    condition: Tensor
    """float32 [F, C, H, W]: the clean latent of context frames, zero elsewhere."""
    roles: Tensor
    """int64 [F], a ``Role`` for each frame."""
    cu_frames: Tensor
    """int64 [B + 1]."""
    born_step: Tensor
    """int64 [F], step at the end of which the frame was inserted; 0 for context and start frames."""
    seeds: Tensor
    """int64 [B], seed of each clip."""
    capped: Tensor
    """bool [B], clips that ``max_frames`` has limited so far."""
    step: int
    """Steps made so far, equal to the number of predictor evaluations."""
    num_inference_steps: int
    """N."""
    time_shift: float
    """s of the time shift."""
    births: Tensor | None = None
    """int64 [P], ``born_step`` of every frame of the finished clips, for a prescribed order; None for ``learned``."""
    clip_flops: Tensor | None = None
    """float64 [B], exact FLOPs spent on each clip so far; None if the predictor does not count."""

    @property
    def clock(self) -> Tensor:
        """The insertion clock ``min(1, step / N)`` of each clip, float64 [B]."""
        return torch.full((len(self.cu_frames) - 1,), self._clock(), dtype=torch.float64)

    def _clock(self) -> float:
        return min(self.step, self.num_inference_steps) / self.num_inference_steps

    @property
    def age(self) -> Tensor:
        """Steps since birth, at most N, int64 [F]."""
        return (self.step - self.born_step).clamp(max=self.num_inference_steps)

    @property
    def times(self) -> Tensor:
        """Time input of each frame, float64 [F], as in training: its shifted time, or the clock for context."""
        own = shift_time(self.age.double() / self.num_inference_steps, self.time_shift)
        return torch.where(is_context(self.roles), self._clock(), own)

    @property
    def moving(self) -> Tensor:
        """Generated frames that are not at time 1, bool [F]."""
        return is_generated(self.roles) & (self.age < self.num_inference_steps)

    @property
    def open_gaps(self) -> Tensor:
        """Whether frames may still be inserted to the right of each frame, bool [F]."""
        if self.births is None:
            return may_insert(self.roles) & (self.step < self.num_inference_steps)
        visible = self.births <= self.step
        left_neighbor = visible.cumsum(0) - 1
        return torch.bincount(left_neighbor[~visible], minlength=len(self.roles)) > 0

    @property
    def unfinished_clips(self) -> Tensor:
        """Clips that may still grow or have a frame below 1, bool [B]; a predictor may skip the others."""
        changing = self.moving | self.open_gaps
        return torch.bincount(self.frame_clip[changing], minlength=len(self.clip_frames)) > 0

    @property
    def finished(self) -> bool:
        """Whether the clock is at 1, all frames are at 1, and no frame remains to be born."""
        return not bool(self.unfinished_clips.any())

    @property
    def last_birth_step(self) -> int:
        """Last step at the end of which a frame may be born: N, or later under a prescribed order."""
        latest = 0 if self.births is None else int(self.births.max())
        return max(self.num_inference_steps, latest)

    @property
    def clip_frames(self) -> Tensor:
        """Frames of each clip, int64 [B]."""
        return self.cu_frames.diff()

    @property
    def frame_clip(self) -> Tensor:
        """Clip of each frame, int64 [F]."""
        return torch.repeat_interleave(self.clip_frames)

    @property
    def frame_rank(self) -> Tensor:
        """Rank of each frame in its clip, int64 [F]."""
        return torch.arange(len(self.roles)) - self.cu_frames[self.frame_clip]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One state of a sampling run, for growth plots.

    Its frames are the result's frames with ``born_at <= clock``, in the same order: frames are never removed or
    reordered.
    """

    clock: float
    """Insertion clock; stays at 1 while the last frames finish (``autoregressive``: at its last birth)."""
    times: Tensor
    """float64 [F], the predictor's time inputs."""
    cu_frames: Tensor
    """int64 [B + 1]."""


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Finished clips."""

    frames: Tensor
    """float32 [F, C, H, W], latents at time 1."""
    cu_frames: Tensor
    """int64 [B + 1]: clip b is ``frames[cu_frames[b] : cu_frames[b + 1]]``."""
    born_at: Tensor
    """float64 [F], clock at insertion; 0 for context and start frames."""
    roles: Tensor
    """int64 [F], a ``Role`` for each frame."""
    evaluations: int
    """Calls of the predictor."""
    clip_flops: Tensor | None
    """float64 [B], exact FLOPs spent on each clip; None if the predictor does not count (``CountedPredictor``)."""
    capped: Tensor
    """bool [B], clips limited by ``max_frames``."""
    history: list[StepRecord] | None
    """Every state from first to last; None unless ``record_history`` is set."""

    @classmethod
    def of(cls, state: SamplerState, history: list[StepRecord] | None = None) -> SampleResult:
        """The clips of a finished state."""
        return cls(
            frames=state.frames,
            cu_frames=state.cu_frames,
            born_at=state.born_step.double() / state.num_inference_steps,
            roles=state.roles,
            evaluations=state.step,
            clip_flops=state.clip_flops,
            capped=state.capped,
            history=history,
        )

    @property
    def flops(self) -> float | None:
        """Exact FLOPs of all clips; None if the predictor does not count."""
        return None if self.clip_flops is None else float(self.clip_flops.sum())

    def clips(self) -> list[Tensor]:
        """The frames of each clip, [n, C, H, W] each."""
        return list(torch.split(self.frames, self.cu_frames.diff().tolist()))


def _opening_roles(context: Context | None, config: SamplerConfig) -> Tensor:
    """Roles of a clip's frames at clock 0, for the learned order: an optional start frame, context, start frames."""
    if context is None:
        return torch.full((max(1, config.num_start_frames),), int(Role.START))
    starts = config.num_start_frames if context.num_start_frames is None else context.num_start_frames
    given = context.roles()
    can_grow = config.insertion is not None and bool((given == Role.CONTEXT_ACTIVE).any())
    if starts == 0 and not can_grow and not context.begins_with_start:
        raise ConfigError(
            "nothing to generate: the context has no active frame that can insert, and num_start_frames is 0; mark a "
            "frame active or raise num_start_frames"
        )
    leading, trailing = (torch.full((count,), int(Role.START)) for count in (int(context.begins_with_start), starts))
    return torch.cat([leading, given, trailing])


def _plans(
    contexts: Sequence[Context | None], config: SamplerConfig, num_frames: Sequence[int] | None, seeds: Tensor
) -> list[ClipPlan] | None:
    """Plans of all clips for a prescribed order; None for the learned order."""
    if config.order == "learned":
        if num_frames is not None or config.num_frames is not None:
            raise ConfigError(
                "num_frames must be null for order=learned, where the model chooses the length; remove it"
            )
        return None
    lengths = [config.num_frames] * len(contexts) if num_frames is None else list(num_frames)
    if len(lengths) != len(contexts) or None in lengths:
        raise ConfigError(f"order={config.order} needs the length of every clip; set num_frames")
    longest = max((int(length or 0) for length in lengths), default=0)
    if longest > config.max_frames:
        raise ConfigError(
            f"`num_frames` must be at most `max_frames`, got {longest} and {config.max_frames}; raise `max_frames`"
        )
    plans = []
    for context, length, seed in zip(contexts, lengths, seeds.tolist()):
        starts = None if context is None else context.num_start_frames
        plan = plan_clip(
            build_delay_law(config.order),
            int(length or 0),
            num_inference_steps=config.num_inference_steps,
            num_start_frames=config.num_start_frames if starts is None else starts,
            schedule=config.schedule(),
            seed=seed,
            context_roles=torch.empty(0, dtype=torch.int64) if context is None else context.roles(),
            places=None if context is None else context.places,
        )
        plans.append(plan)
    return plans


def _check(contexts: Sequence[Context | None], frame_shape: tuple[int, ...], sizes: Tensor, max_frames: int) -> None:
    for clip, context in enumerate(contexts):
        if context is not None and tuple(context.frames.shape[1:]) != frame_shape:
            raise ConfigError(
                f"context frames of clip {clip} must have shape {frame_shape}, got {tuple(context.frames.shape[1:])}"
            )
    if len(sizes) and int(sizes.max()) > max_frames:
        raise ConfigError(
            f"`max_frames` must be at least the number of frames a clip starts with, got {max_frames} and "
            f"{int(sizes.max())}; raise it"
        )


def initial_state(
    frame_shape: tuple[int, ...],
    batch_size: int,
    config: SamplerConfig,
    context: Sequence[Context | None] | None = None,
    seed: int | Sequence[int] = 0,
    device: torch.device | str = "cpu",
    num_frames: Sequence[int] | None = None,
) -> SamplerState:
    """The state at clock 0: each clip's context frames, and its start frames as noise.

    Arguments as in ``flowception.flow.sampler.SampleArguments``.

    Returns:
        The state.

    Raises:
        ConfigError: If the arguments are inconsistent.
    """
    frame_shape = tuple(frame_shape)
    contexts = list(context) if context is not None else [None] * batch_size
    if len(contexts) != batch_size:
        raise ConfigError(f"context must have one entry per clip, got {len(contexts)} for batch_size {batch_size}")
    seeds = seed + torch.arange(batch_size) if isinstance(seed, int) else torch.tensor(list(seed), dtype=torch.int64)
    if len(seeds) != batch_size or bool((seeds < 0).any()):
        raise ConfigError(f"seed must be an integer >= 0, or one per clip, got {seed} for batch_size {batch_size}")
    plans = _plans(contexts, config, num_frames, seeds)
    if plans is None:
        opening = [_opening_roles(item, config) for item in contexts]
    else:
        opening = [plan.roles[plan.born_step == 0] for plan in plans]
    sizes = torch.tensor([len(roles) for roles in opening], dtype=torch.int64)
    _check(contexts, frame_shape, sizes, config.max_frames)
    roles = torch.cat([torch.empty(0, dtype=torch.int64), *opening])
    cu_frames = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    clip = torch.repeat_interleave(sizes)
    rank = torch.arange(len(clip)) - cu_frames[clip]
    given, started = is_context(roles), is_generated(roles)
    frames = torch.empty(len(clip), *frame_shape)
    condition = torch.zeros(len(clip), *frame_shape)
    noise = fresh_noise(seeds[clip[started]].numpy(), 0, rank[started].numpy(), frame_shape)
    frames[started] = torch.from_numpy(noise)
    if given.any():
        clean = [item.frames.detach().to("cpu", torch.float32) for item in contexts if item is not None]
        condition[given] = torch.cat(clean)
        frames[given] = condition[given]
    return SamplerState(
        frames=frames.to(device),
        condition=condition.to(device),
        roles=roles,
        cu_frames=cu_frames,
        born_step=torch.zeros(len(clip), dtype=torch.int64),
        seeds=seeds,
        capped=torch.zeros(batch_size, dtype=torch.bool),
        step=0,
        num_inference_steps=config.num_inference_steps,
        time_shift=config.time_shift,
        births=None if plans is None else torch.cat([plan.born_step for plan in plans]),
    )


def step_sizes(state: SamplerState) -> Tensor:
    """Change of each frame's shifted time in the next step, float64 [F]; 0 for frames that do not move."""
    grid = torch.arange(state.num_inference_steps + 1, dtype=torch.float64) / state.num_inference_steps
    sizes = torch.cat([shift_time(grid, state.time_shift).diff(), torch.zeros(1, dtype=torch.float64)])
    return torch.where(is_generated(state.roles), sizes[state.age], 0.0)
