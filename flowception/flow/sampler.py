"""The sampler: denoises existing frames and inserts new ones, with any predictor (docs/method.md).

Frame ages are integer steps: after k steps a frame's unshifted time is ``min(1, k / N)``, so the last step reaches
exactly 1 for any N. Each step evaluates the predictor once, moves every generated frame by
``(shift(s + h) - shift(s)) velocity``, and, while the clock is below 1, inserts frames to the right of frames that may
insert. Sampling ends when the clock and all frames are at 1, after N to 2 N evaluations. A prescribed order
(``prescribed``) replaces the rates with delays drawn in advance::

    result = sample(predict, frame_shape=(C, H, W), batch_size=B, config=SamplerConfig(), seed=0)
    # predict(state) -> (velocity [F, C, H, W], rate [F])
    result.evaluations, result.flops  # the cost; FLOPs if the predictor counts them

Noise and insertion are keyed by clip seed, step and slot, so a clip is the same when sampled alone or in a batch.

Shape legend: as in ``sampler_state``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol, Required, TypedDict, Unpack, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flowception.flow.insertion import INSERTION_RULES, Counts
from flowception.flow.noise import fresh_noise
from flowception.flow.prescribed import due_counts
from flowception.flow.sampler_state import (
    Context,
    SamplerConfig,
    SampleResult,
    SamplerState,
    StepRecord,
    initial_state,
    step_sizes,
)
from flowception.flow.task import Role, may_insert
from flowception.progress import EVERY_RANK
from flowception.rng import Stream, uniforms

logger = logging.getLogger(__name__)

Predictor = Callable[[SamplerState], tuple[Tensor, Tensor]]
"""``state -> (velocity [F, C, H, W], rate [F])``. The rate is the expected number of missing frames to the right."""


@runtime_checkable
class CountedPredictor(Protocol):
    """A predictor that counts its FLOPs."""

    def __call__(self, state: SamplerState) -> tuple[Tensor, Tensor]:
        """Predict, as ``Predictor``."""

    def flops(self, state: SamplerState) -> Tensor:
        """FLOPs of evaluating the state, per clip, float64 [B]."""


def _move(state: SamplerState, velocity: Tensor) -> Tensor:
    """Frames after the next step, [F, C, H, W]; frames that do not move are bitwise unchanged for any velocity."""
    device = state.frames.device
    sizes = step_sizes(state).to(device, torch.float32)[:, None, None, None]
    # Separate multiply and add: the rounding of a fused operation could depend on a frame's position in memory.
    change = sizes * velocity.to(state.frames.dtype)
    return torch.where(state.moving.to(device)[:, None, None, None], state.frames + change, state.frames)


def _insertion_counts(state: SamplerState, rate: Tensor, config: SamplerConfig) -> Counts:
    """Frames to insert to the right of each frame in this step, before the cap, [F]."""
    rates = rate.detach().to("cpu", torch.float64).numpy()
    active = may_insert(state.roles).numpy()
    if not np.all(np.isfinite(rates[active]) & (rates[active] >= 0)):
        bad = rates[active][~(np.isfinite(rates[active]) & (rates[active] >= 0))][0]
        raise ValueError(f"the predictor's rates must be finite and >= 0, got {bad} at step {state.step}")
    chances = uniforms(
        0,
        Stream.SAMPLER,
        epoch=state.step + 1,
        clip=state.seeds[state.frame_clip].numpy(),
        frame=state.frame_rank.numpy(),
    )
    rule = INSERTION_RULES[str(config.insertion)]
    p = config.schedule().appearance_probability(state.step, state.num_inference_steps)
    return rule(rates, state.cu_frames.numpy(), active, p, chances)


def _cap(state: SamplerState, counts: Counts, max_frames: int) -> tuple[Counts, Tensor]:
    """Counts limited to ``max_frames``, keeping a clip's leftmost, and whether each clip was limited, bool [B]."""
    clip, cu_frames = state.frame_clip.numpy(), state.cu_frames.numpy()
    running = np.concatenate([[0], np.cumsum(counts)])
    before = running[:-1] - running[cu_frames[clip]]
    room = max_frames - np.diff(cu_frames)
    kept = np.minimum(counts, np.maximum(room[clip] - before, 0))
    cut = np.bincount(clip[kept < counts], minlength=len(room)) > 0
    newly = np.flatnonzero(cut & ~state.capped.numpy())
    if len(newly):
        shown = ", ".join(map(str, newly[:8])) + (", ..." if len(newly) > 8 else "")
        logger.warning(
            "max_frames = %d limited insertions in %d clips (%s) at step %d; raise max_frames to allow longer clips",
            max_frames,
            len(newly),
            shown,
            state.step,
            extra=EVERY_RANK,
        )
    return kept, state.capped | torch.from_numpy(cut)


def _insert(state: SamplerState, counts: Counts) -> SamplerState:
    """The state with ``counts[i]`` new frames to the right of frame i, born at the end of this step."""
    born = state.step + 1
    source = np.repeat(np.arange(len(counts)), counts + 1)
    is_new = np.ones(len(source), dtype=bool)
    is_new[np.arange(len(counts)) + np.cumsum(counts) - counts] = False
    running = np.concatenate([[0], np.cumsum(counts)])
    cu_frames = state.cu_frames + torch.from_numpy(running)[state.cu_frames]
    clip = state.frame_clip.numpy()[source[is_new]]
    slots = np.flatnonzero(is_new) - cu_frames.numpy()[clip]
    noise = fresh_noise(state.seeds.numpy()[clip], born, slots, tuple(state.frames.shape[1:]))
    take, new = torch.from_numpy(source), torch.from_numpy(is_new)
    device = state.frames.device
    take_there = take.to(device)
    new_there = torch.nonzero(new).flatten().to(device)  # indices: indexing with a device mask would synchronize
    frames = state.frames[take_there].index_copy_(0, new_there, torch.from_numpy(noise).to(device))
    condition = state.condition[take_there].index_fill_(0, new_there, 0.0)
    return replace(
        state,
        frames=frames,
        condition=condition,
        roles=torch.where(new, int(Role.FREE), state.roles[take]),
        born_step=torch.where(new, born, state.born_step[take]),
        cu_frames=cu_frames,
    )


def advance(state: SamplerState, velocity: Tensor, rate: Tensor, config: SamplerConfig) -> SamplerState:
    """Make one step: move, then insert.

    Args:
        state: The state that was evaluated.
        velocity: [F, C, H, W].
        rate: [F], expected number of missing frames to the right of each frame.
        config: The sampler configuration.

    Returns:
        The next state.

    Raises:
        ValueError: If a shape is wrong or a rate is negative or not finite.
    """
    if velocity.shape != state.frames.shape or rate.shape != state.roles.shape:
        raise ValueError(
            f"the predictor must return velocity {tuple(state.frames.shape)} and rate {tuple(state.roles.shape)}, got "
            f"{tuple(velocity.shape)} and {tuple(rate.shape)}"
        )
    moved = replace(state, frames=_move(state, velocity))
    if state.births is not None:
        counts = due_counts(state.births, state.step)
        moved = _insert(moved, counts) if counts.any() else moved
    elif config.insertion is not None and state.step < state.num_inference_steps:
        counts, capped = _cap(state, _insertion_counts(state, rate, config), config.max_frames)
        moved = replace(moved, capped=capped)
        if counts.any():
            moved = _insert(moved, counts)
    return replace(moved, step=state.step + 1)


class SampleArguments(TypedDict, total=False):
    """Arguments of ``sample`` and ``sample_states`` besides the predictor and the config."""

    frame_shape: Required[tuple[int, int, int]]
    """(C, H, W)."""
    batch_size: Required[int]
    """B."""
    context: Sequence[Context | None] | None
    """One entry per clip, None for a clip without context. Default None: no clip has context."""
    seed: int | Sequence[int]
    """Clip i has seed ``seed + i``, or ``seed[i]`` for a sequence. Default 0."""
    device: torch.device | str
    """Device of the frames and of ``predict``. Default ``cpu``."""
    num_frames: Sequence[int] | None
    """Length of each clip, for a prescribed order. Default None: the config's ``num_frames``."""


def sample_states(
    predict: Predictor, *, config: SamplerConfig, **arguments: Unpack[SampleArguments]
) -> Iterator[SamplerState]:
    """Sample step by step.

    Args:
        predict: The predictor, or an exact oracle.
        config: How clips are sampled.
        **arguments: ``frame_shape``, ``batch_size``, ``context``, ``seed``, ``device`` and ``num_frames``, as
            ``SampleArguments`` describes them.

    Yields:
        Every state from clock 0 to the finished one. Its ``step`` is the number of evaluations so far.

    Raises:
        ConfigError: If the arguments are inconsistent; raised before the first state.
    """
    state = initial_state(config=config, **arguments)
    if isinstance(predict, CountedPredictor):
        state = replace(state, clip_flops=torch.zeros(len(state.clip_frames), dtype=torch.float64))
    yield state
    while not state.finished:
        with torch.no_grad():
            velocity, rate = predict(state)
            following = advance(state, velocity, rate, config)
        if isinstance(predict, CountedPredictor) and state.clip_flops is not None:
            following = replace(following, clip_flops=state.clip_flops + predict.flops(state))
        state = following
        yield state


def sample(predict: Predictor, *, config: SamplerConfig, **arguments: Unpack[SampleArguments]) -> SampleResult:
    """Sample clips.

    Args:
        predict: ``predict(state) -> (velocity [F, C, H, W], rate [F])``: a network, or an exact oracle.
        config: How clips are sampled.
        **arguments: ``frame_shape``, ``batch_size``, ``context``, ``seed``, ``device`` and ``num_frames``, as
            ``SampleArguments`` describes them.

    Returns:
        The finished clips.

    Raises:
        ConfigError: If the arguments are inconsistent.
    """
    history: list[StepRecord] | None = [] if config.record_history else None
    for state in sample_states(predict, config=config, **arguments):
        if history is not None:
            clock = min(state.step, state.last_birth_step) / state.num_inference_steps
            history.append(StepRecord(clock=clock, times=state.times, cu_frames=state.cu_frames))
    return SampleResult.of(state, history)
