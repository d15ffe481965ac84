"""Prescribed orders: plans equal training's draws, states follow the plan, and frames reach time 1."""

import numpy as np
import pytest
import torch

from flowception.errors import ConfigError
from flowception.flow import Context, ProcessConfig, Role, SamplerConfig, build_schedule, draw_clips, sample
from flowception.flow.delays import PRESCRIBED_LAWS, build_delay_law
from flowception.flow.prescribed import due_counts, plan_clip
from flowception.flow.sampler import sample_states
from flowception.flow.sampler_state import initial_state
from flowception.rng import Stream, uniforms

SHAPE = (2, 3, 2)
ACTIVE, PASSIVE = int(Role.CONTEXT_ACTIVE), int(Role.CONTEXT_PASSIVE)
NO_CONTEXT, ONE_FRAME = torch.empty(0, dtype=torch.int64), torch.tensor([ACTIVE])


def plan(order, num_frames, seed=0, context_roles=NO_CONTEXT, places=None, num_start_frames=2, steps=20):
    return plan_clip(
        build_delay_law(order),
        num_frames,
        num_inference_steps=steps,
        num_start_frames=num_start_frames,
        schedule=build_schedule("cosine"),
        seed=seed,
        context_roles=context_roles,
        places=places,
    )


def run(predict, batch_size=3, context=None, seed=0, num_frames=None, **config):
    """``num_frames`` is the config's as a number, the call's as a list."""
    if isinstance(num_frames, int):
        config, num_frames = {**config, "num_frames": num_frames}, None
    return sample(
        predict,
        frame_shape=SHAPE,
        batch_size=batch_size,
        config=SamplerConfig(**config),
        context=context,
        seed=seed,
        num_frames=num_frames,
    )


def states_of(predict, batch_size, num_frames, context=None, seed=0, **config):
    arguments = {"frame_shape": SHAPE, "batch_size": batch_size, "config": SamplerConfig(**config)}
    return list(sample_states(predict, **arguments, context=context, seed=seed, num_frames=num_frames))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("order", PRESCRIBED_LAWS)
def test_a_plan_is_what_training_draws_from_the_same_uniforms(order, task):
    config = ProcessConfig(delay_law=order, tasks={task: 1.0}, num_start_frames=2, insertion_schedule="cosine")
    for seed, n in enumerate([2, 3, 7, 12, 19] * 4):
        u = uniforms(0, Stream.SAMPLER, clip=seed, frame=np.arange(n))
        draws = draw_clips(config, np.array([n]), np.zeros(1), np.zeros(1), u[None])
        planned = plan(order, n, seed, NO_CONTEXT if task == "t2v" else ONE_FRAME)
        assert torch.equal(planned.roles, draws.roles[0])
        # Born at the end of the step in which the delay runs out.
        delay = draws.delay[0]
        assert (planned.born_step >= delay * 20 - 1e-9).all()
        assert (planned.born_step < delay * 20 + 1 - 1e-9).all()


def test_births_right_of_each_frame_worked_example():
    births = torch.tensor([0, 3, 2, 0, 0, 3, 3, 1])  # two clips: the second begins at the fifth frame
    assert due_counts(births, 0).tolist() == [0, 0, 1]
    assert due_counts(births, 1).tolist() == [1, 0, 0, 0]
    assert due_counts(births, 2).tolist() == [1, 0, 0, 2, 0]
    assert due_counts(births, 3).tolist() == [0] * 8


@pytest.mark.parametrize("order", PRESCRIBED_LAWS)
def test_states_follow_the_plan(constant_predictor, order):
    lengths, steps = [7, 1, 4], 5
    config = {"order": order, "num_inference_steps": steps, "num_start_frames": 2, "time_shift": 3.0}
    states = states_of(constant_predictor(rate=9.0), 3, lengths, seed=4, insertion_schedule="cosine", **config)
    births = [plan(order, n, 4 + i, steps=steps).born_step for i, n in enumerate(lengths)]
    last = max(int(born.max()) for born in births) + steps
    assert [state.step for state in states] == list(range(last + 1))
    for state in states:
        present = [born[born <= state.step] for born in births]
        assert state.clip_frames.tolist() == [len(born) for born in present]
        assert torch.equal(state.born_step, torch.cat(present))
        assert (state.clock == min(1.0, state.step / steps)).all()
    assert states[-1].clip_frames.tolist() == lengths
    assert (states[-1].times == 1).all()
    assert not any(state.finished for state in states[:-1])


@pytest.mark.parametrize("order", ["random", "left_to_right", "hierarchical"])
def test_as_many_frames_are_visible_as_in_training(order):
    """On the step grid a free frame is visible with probability kappa: binomial counts, in closed form."""
    n, steps, clips = 9, 10, 1500
    births = torch.stack([plan(order, n, seed, num_start_frames=1, steps=steps).born_step for seed in range(clips)])
    for step in (2, 5, 8):
        kappa = build_schedule("cosine").kappa(torch.tensor(step / steps).double()).item()
        visible = (births <= step).sum(dim=1).double()
        assert visible.mean().item() == pytest.approx(1 + 8 * kappa, abs=0.15)
        assert visible.var().item() == pytest.approx(8 * kappa * (1 - kappa), rel=0.15)


@pytest.mark.parametrize("order", PRESCRIBED_LAWS)
def test_an_exact_velocity_ends_at_the_data(order):
    target = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def predict(state):
        left = (1 - state.times).clamp(min=1e-9).float()[:, None, None, None]
        return (target - state.frames) / left, torch.full((len(state.frames),), float("nan"))

    result = run(predict, order=order, num_frames=6, num_inference_steps=7, time_shift=3.0)
    assert result.cu_frames.tolist() == [0, 6, 12, 18]
    torch.testing.assert_close(result.frames, target.expand_as(result.frames), atol=1e-5, rtol=0)


def test_autoregression_finishes_a_frame_before_it_begins_the_next(constant_predictor):
    states = states_of(constant_predictor(), 2, [5, 3], order="autoregressive", num_inference_steps=4)
    assert len(states) == 1 + 5 * 4
    for state in states[:-1]:
        moving = torch.zeros(2, dtype=torch.int64).index_add(0, state.frame_clip, state.moving.long())
        assert moving.tolist() == [1, int(state.step < 12)]
        done = state.times[state.cu_frames[0] : state.cu_frames[1]][:-1]
        assert (done == 1).all()
    result = run(constant_predictor(), 1, order="autoregressive", num_frames=5, num_inference_steps=4)
    assert result.born_at.tolist() == [0, 1, 2, 3, 4]
    assert result.evaluations == 20


def test_full_sequence_is_sampling_without_insertion(own_frame_predictor):
    prescribed = run(own_frame_predictor, order="full_sequence", num_frames=7, num_inference_steps=10)
    plain = run(own_frame_predictor, insertion=None, num_start_frames=7, num_inference_steps=10)
    assert torch.equal(prescribed.frames, plain.frames)
    assert prescribed.evaluations == plain.evaluations == 10
    assert (prescribed.roles == Role.START).all()


@pytest.mark.parametrize("order", PRESCRIBED_LAWS)
def test_a_clip_is_the_same_alone_or_in_a_batch(own_frame_predictor, order):
    image = Context(frames=torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)))
    contexts, lengths = [None, image, None, image], [5, 3, 9, 7]
    config = {"order": order, "num_inference_steps": 6}
    together = run(own_frame_predictor, 4, contexts, seed=40, num_frames=lengths, **config)
    assert together.cu_frames.diff().tolist() == lengths
    for clip, context in enumerate(contexts):
        alone = run(own_frame_predictor, 1, [context], seed=40 + clip, num_frames=lengths[clip : clip + 1], **config)
        here = slice(together.cu_frames[clip], together.cu_frames[clip + 1])
        assert torch.equal(alone.frames, together.frames[here])
        assert torch.equal(alone.born_at, together.born_at[here])
        assert torch.equal(alone.roles, together.roles[here])


@pytest.mark.parametrize("order", PRESCRIBED_LAWS)
def test_keyframes_keep_their_places(constant_predictor, order):
    frames = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    context = Context(frames=frames, active=[True, True, False], num_start_frames=0, places=[0, 4, 9])
    result = run(constant_predictor(velocity=5.0), 2, [context] * 2, order=order, num_frames=10, num_inference_steps=6)
    for clip in result.clips():
        assert torch.equal(clip[[0, 4, 9]], frames)
    given = [i in (0, 4, 9) for i in range(10)]
    assert [role in (ACTIVE, PASSIVE) for role in result.roles.tolist()] == given * 2
    if order == "left_to_right":
        births = result.born_at[:10][~torch.tensor(given)]
        assert (births.diff() >= 0).all()


@pytest.mark.parametrize("order", PRESCRIBED_LAWS)
def test_history_records_which_frames_existed(constant_predictor, order):
    config = {"order": order, "num_frames": 6, "num_inference_steps": 4}
    result = run(constant_predictor(), record_history=True, **config)
    assert len(result.history) == result.evaluations + 1
    for record in result.history:
        present = (result.born_at <= record.clock).view(3, 6).sum(dim=1)
        assert torch.equal(present, record.cu_frames.diff())


def test_inconsistent_arguments_are_rejected(constant_predictor):
    predict, random = constant_predictor(), {"order": "random"}
    two = Context(frames=torch.zeros(2, *SHAPE))
    with pytest.raises(ConfigError, match="num_frames must be null for order=learned"):
        run(predict, num_frames=[3, 3, 3])
    with pytest.raises(ConfigError, match="num_frames must be null for order=learned"):
        initial_state(SHAPE, 1, SamplerConfig(num_frames=4))
    with pytest.raises(ConfigError, match="order=random needs the length of every clip; set num_frames"):
        run(predict, **random)
    with pytest.raises(ConfigError, match="needs the length of every clip; set num_frames"):
        run(predict, num_frames=[3], **random)
    with pytest.raises(ConfigError, match="`num_frames` must be at most `max_frames`, got 9 and 8"):
        run(predict, num_frames=[3, 9, 4], max_frames=8, **random)
    with pytest.raises(ConfigError, match="num_frames must be greater than the number of context frames, got 2 and 2"):
        run(predict, 1, [two], num_frames=[2], **random)
    for places in ([1], [1, 1], [2, 0], [0, 5]):
        with pytest.raises(ConfigError, match="must be 2 ascending frame indices from 0 to 4"):
            plan("random", 5, context_roles=two.roles(), places=places)
    with pytest.raises(ConfigError, match="context frame 0 of 5 must be active because the frame to its right is"):
        plan("random", 5, context_roles=two.roles(), places=[0, 4])
    with pytest.raises(ConfigError, match="num_frames must be greater than .*, got 0"):
        run(predict, num_frames=[0, 3, 3], **random)
