"""The sampler: clocks, context, cap, order of frames, independence of the batch, and errors."""

import logging

import numpy as np
import pytest
import torch

from flowception.errors import ConfigError
from flowception.flow import Context, Role, SamplerConfig, sample, sample_states, shift_time
from flowception.flow.noise import fresh_noise

SHAPE = (2, 3, 2)
RULES = ["thinning", "bernoulli", "poisson"]


def run(predict, batch_size=3, context=None, seed=0, **config):
    return sample(
        predict, frame_shape=SHAPE, batch_size=batch_size, config=SamplerConfig(**config), context=context, seed=seed
    )


def states_of(predict, batch_size=3, context=None, seed=0, **config):
    return list(
        sample_states(
            predict,
            frame_shape=SHAPE,
            batch_size=batch_size,
            config=SamplerConfig(**config),
            context=context,
            seed=seed,
        )
    )


@pytest.mark.parametrize("num_steps", [1, 7, 10, 20, 25, 49, 50])
@pytest.mark.parametrize("time_shift", [1.0, 3.0])
def test_the_last_step_lands_on_one_exactly(constant_predictor, num_steps, time_shift):
    config = {"num_inference_steps": num_steps, "time_shift": time_shift}
    states = states_of(constant_predictor(velocity=1.0, rate=0.4), **config)
    last = states[-1]
    assert (last.times == 1).all()
    assert (last.clock == 1).all()
    assert last.finished
    assert not any(state.finished for state in states[:-1])
    assert last.step == num_steps + int(last.born_step.max()) <= 2 * num_steps
    # Under velocity 1 a frame moves by its whole time, 1.
    noise = fresh_noise(last.seeds[last.frame_clip].numpy(), 0, last.frame_rank.numpy(), SHAPE)
    start = (last.roles == Role.START) & (last.frame_rank == 0)
    torch.testing.assert_close(last.frames[start] - torch.from_numpy(noise)[start], torch.ones(3, *SHAPE))


def test_times_are_the_shifted_steps_since_birth(constant_predictor):
    states = states_of(constant_predictor(rate=0.5), num_inference_steps=10, time_shift=3.0, seed=2)
    assert len(states[-1].roles) > 9
    for k, state in enumerate(states):
        assert state.step == k
        assert (state.clock == min(1.0, k / 10)).all()
        own = torch.tensor([min(1.0, (k - born) / 10) for born in state.born_step.tolist()], dtype=torch.float64)
        torch.testing.assert_close(state.times, shift_time(own, 3.0))


def test_the_whole_way_is_cut_into_steps_of_the_shifted_time(constant_predictor):
    states = states_of(constant_predictor(velocity=1.0), num_inference_steps=5, time_shift=3.0)
    for before, after in zip(states, states[1:], strict=False):
        expected = (after.times - before.times).float()[:, None, None, None].expand_as(after.frames)
        torch.testing.assert_close(after.frames - before.frames, expected, atol=1e-6, rtol=0)


def test_an_exact_velocity_ends_at_the_data(constant_predictor):
    target = torch.randn(SHAPE)

    def predict(state):
        left = (1 - state.times).clamp(min=1e-9).float()[:, None, None, None]
        return (target - state.frames) / left, torch.full((len(state.frames),), 0.3)

    result = run(predict, num_inference_steps=20, time_shift=3.0)
    torch.testing.assert_close(result.frames, target.expand_as(result.frames), atol=1e-5, rtol=0)


@pytest.mark.parametrize("insertion", RULES)
def test_a_clip_is_the_same_alone_or_in_a_batch(own_frame_predictor, insertion):
    image = Context(frames=torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)))
    contexts = [None, image, None, image, None]
    config = {"insertion": insertion, "num_inference_steps": 12}
    together = run(own_frame_predictor, 5, contexts, seed=40, **config)
    assert len(set(together.cu_frames.diff().tolist())) > 1
    for clip, context in enumerate(contexts):
        alone = run(own_frame_predictor, 1, [context], seed=40 + clip, **config)
        here = slice(together.cu_frames[clip], together.cu_frames[clip + 1])
        assert torch.equal(alone.frames, together.frames[here])
        assert torch.equal(alone.born_at, together.born_at[here])
        assert torch.equal(alone.roles, together.roles[here])


def test_each_clip_can_have_its_own_seed(own_frame_predictor):
    seeds = [7, 3, 7]
    together = run(own_frame_predictor, 3, seed=seeds, num_inference_steps=5).clips()
    alone = [run(own_frame_predictor, 1, seed=seed, num_inference_steps=5).clips()[0] for seed in seeds]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert not torch.isin(together[0], together[1]).any()
    with pytest.raises(
        ConfigError, match=r"seed must be an integer >= 0, or one per clip, got \[1, 2\] for batch_size 3"
    ):
        run(own_frame_predictor, 3, seed=[1, 2])
    with pytest.raises(ConfigError, match="seed must be an integer >= 0, or one per clip, got -1 for batch_size 3"):
        run(own_frame_predictor, 3, seed=-1)


def test_clips_of_one_batch_differ(own_frame_predictor):
    first, second = run(own_frame_predictor, 2, num_inference_steps=5).clips()
    assert not torch.isin(first, second).any()


def test_context_stays_and_nothing_comes_right_of_a_passive_frame(constant_predictor):
    frames = torch.randn(4, *SHAPE)
    context = Context(frames=frames, active=[False, True, False, True], num_start_frames=1)
    config = {"num_inference_steps": 10, "time_shift": 3.0}
    states = states_of(constant_predictor(velocity=5.0, rate=2.0), 2, [context] * 2, **config)
    for state in states:
        given = (state.roles == Role.CONTEXT_ACTIVE) | (state.roles == Role.CONTEXT_PASSIVE)
        assert torch.equal(state.frames[given], frames.repeat(2, 1, 1, 1))
        assert torch.equal(state.condition[given], frames.repeat(2, 1, 1, 1))
        assert (state.condition[~given] == 0).all()
        assert (state.times[given] == state.clock[0]).all()
    last = states[-1]
    for clip in range(2):
        roles = last.roles[last.cu_frames[clip] : last.cu_frames[clip + 1]].tolist()
        passive = [i for i, role in enumerate(roles) if role == Role.CONTEXT_PASSIVE]
        assert passive[0] == 0
        assert all(roles[i + 1] == Role.CONTEXT_ACTIVE for i in passive)
        active = [i for i, role in enumerate(roles) if role == Role.CONTEXT_ACTIVE]
        assert all(roles[i + 1] == Role.FREE for i in active)
        assert roles.count(Role.START) == 1


def test_continuation_is_the_default_of_a_context(constant_predictor):
    roles = Context(frames=torch.zeros(3, *SHAPE)).roles().tolist()
    assert roles == [Role.CONTEXT_PASSIVE, Role.CONTEXT_PASSIVE, Role.CONTEXT_ACTIVE]
    result = run(constant_predictor(), 2, [Context(frames=torch.zeros(1, *SHAPE)), None], num_inference_steps=2)
    assert result.roles.tolist() == [Role.CONTEXT_ACTIVE] + [Role.START] * 6


@pytest.mark.parametrize("insertion", RULES)
def test_the_cap_holds_and_says_so(constant_predictor, insertion, caplog):
    def predict(state):
        rate = torch.where(state.seeds[state.frame_clip] == 0, 0.0, 9.0)
        return torch.zeros_like(state.frames), rate

    with caplog.at_level(logging.WARNING, logger="flowception"):
        result = run(predict, 3, insertion=insertion, num_inference_steps=8, max_frames=11)
    assert result.cu_frames.diff().tolist() == [3, 11, 11]
    assert result.capped.tolist() == [False, True, True]
    assert "max_frames = 11 limited insertions in" in caplog.text
    assert len(caplog.records) <= 2  # once for each clip at most


def test_a_cap_that_is_just_reached_says_nothing(caplog):
    def predict(state):
        missing = 11 - state.clip_frames
        return torch.zeros_like(state.frames), (missing / state.clip_frames)[state.frame_clip]

    with caplog.at_level(logging.WARNING, logger="flowception"):
        result = run(predict, 3, num_inference_steps=8, max_frames=11)
    assert result.cu_frames.diff().tolist() == [11, 11, 11]
    assert not result.capped.any()
    assert not caplog.records


@pytest.mark.parametrize("insertion", RULES)
def test_frames_keep_their_order_and_identity(constant_predictor, insertion):
    """At velocity 0 a frame's noise is its name: every state holds the names of the one before, in the same order."""
    states = states_of(constant_predictor(rate=1.5), 4, insertion=insertion, num_inference_steps=10, max_frames=40)
    for before, after in zip(states, states[1:], strict=False):
        for clip in range(4):
            old = before.frames[before.cu_frames[clip] : before.cu_frames[clip + 1]]
            here = slice(after.cu_frames[clip], after.cu_frames[clip + 1])
            stays = after.born_step[here] <= before.step
            assert torch.equal(after.frames[here][stays], old)
            assert (after.roles[here][~stays] == Role.FREE).all()
            assert (after.age[here][~stays] == 0).all()
    names = states[-1].frames.flatten(1)[:, 0]
    assert len(set(names.tolist())) == len(names) > 12


def test_a_frame_is_inserted_right_of_its_own_site():
    """Only the context frame of value 2 asks for frames: they must lie between it and the frame of value 3."""
    values = torch.arange(5.0)[:, None, None, None].expand(5, *SHAPE)
    context = Context(frames=values, active=[True] * 5, num_start_frames=0)

    def predict(state):
        is_two = (state.roles == Role.CONTEXT_ACTIVE) & (state.frames.flatten(1)[:, 0] == 2)
        return torch.zeros_like(state.frames), 3.0 * is_two

    result = run(predict, 50, [context] * 50, num_inference_steps=6)
    for clip in range(50):
        here = slice(result.cu_frames[clip], result.cu_frames[clip + 1])
        given = torch.nonzero(result.roles[here] == Role.CONTEXT_ACTIVE).flatten().tolist()
        assert given[:3] == [0, 1, 2]
        assert given[4] == given[3] + 1 == len(result.roles[here]) - 1
        assert given[3] >= 6  # three frames wanted, and again after each


def test_history_records_which_frames_existed(own_frame_predictor):
    config = {"num_inference_steps": 9, "time_shift": 3.0, "seed": 3}
    result = run(own_frame_predictor, record_history=True, **config)
    states = states_of(own_frame_predictor, **config)
    assert len(result.history) == result.evaluations + 1 == len(states)
    clip = torch.repeat_interleave(result.cu_frames.diff())
    for record, state in zip(result.history, states, strict=True):
        assert torch.equal(record.times, state.times)
        present = result.born_at <= record.clock
        assert torch.equal(torch.bincount(clip[present], minlength=3), record.cu_frames.diff())
    assert run(own_frame_predictor, **config).history is None


def test_no_insertion_is_full_sequence_sampling(constant_predictor):
    result = run(constant_predictor(rate=9.0), insertion=None, num_start_frames=7, num_inference_steps=10)
    assert result.cu_frames.tolist() == [0, 7, 14, 21]
    assert result.evaluations == 10
    assert (result.roles == Role.START).all()


def test_noise_is_keyed_by_birth_and_slot(constant_predictor):
    result = run(constant_predictor(rate=1.0), 2, num_inference_steps=4, seed=5)
    starts = result.roles == Role.START
    expected = fresh_noise(np.array([5] * 3 + [6] * 3), 0, np.array([0, 1, 2] * 2), SHAPE)
    assert np.array_equal(result.frames[starts].numpy(), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1, got 0"),
        ({"insertion": "exact"}, "insertion must be one of thinning, .*, or null .*, got 'exact'"),
        ({"order": "uniform"}, "order must be one of learned, full_sequence, autoregressive, .*, got 'uniform'"),
        ({"num_frames": 0}, "num_frames must be an integer >= 1, or null for the learned order, got 0"),
        ({"insertion_schedule": "late"}, "insertion_schedule must be one of .*, got 'late'"),
        ({"max_frames": 0}, "max_frames must be an integer from 1 to [0-9]+, got 0"),
        ({"time_shift": 0.0}, r"time_shift must be a number >= 1, got 0\.0"),
        ({"num_start_frames": -1}, "num_start_frames must be an integer >= 0, got -1"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SamplerConfig(**wrong)


def test_wrong_contexts_are_rejected(constant_predictor):
    predict = constant_predictor()
    with pytest.raises(ConfigError, match="one entry per clip, got 1 for batch_size 3"):
        run(predict, 3, [None])
    with pytest.raises(ConfigError, match=r"context frames of clip 0 .*, got \(2, 3, 3\)"):
        run(predict, 1, [Context(frames=torch.zeros(1, 2, 3, 3))])
    with pytest.raises(ConfigError, match="K >= 1"):
        run(predict, 1, [Context(frames=torch.zeros(2, 3, 3))])
    with pytest.raises(ConfigError, match="one entry per context frame, got 2"):
        run(predict, 1, [Context(frames=torch.zeros(1, *SHAPE), active=[True, False])])
    with pytest.raises(ConfigError, match="nothing to generate"):
        run(predict, 1, [Context(frames=torch.zeros(1, *SHAPE), active=[False], num_start_frames=0)])
    with pytest.raises(ConfigError, match="a clip starts with, got 4 and 5; raise it"):
        run(predict, 1, num_start_frames=5, max_frames=4)


def test_a_wrong_prediction_is_rejected(constant_predictor):
    with pytest.raises(ValueError, match="got nan at step 0"):
        run(constant_predictor(rate=float("nan")))
    with pytest.raises(ValueError, match=r"got -1\.0 at step"):
        run(constant_predictor(rate=-1.0))
    with pytest.raises(ValueError, match=r"got .* and \(9, 1\)"):
        run(lambda state: (torch.zeros_like(state.frames), torch.zeros(len(state.frames), 1)))


def test_flops_are_added_up_over_the_evaluations(own_frame_predictor):
    class Counted:
        """Frames cost 2, and the step's number is paid once a clip."""

        def __call__(self, state):
            return own_frame_predictor(state)

        def flops(self, state):
            return 2.0 * state.clip_frames.double() + state.step

    states = states_of(own_frame_predictor, num_inference_steps=6)
    expected = sum(2.0 * state.clip_frames.double() + state.step for state in states[:-1])
    result = run(Counted(), num_inference_steps=6)
    assert result.evaluations == len(states) - 1
    assert torch.equal(result.clip_flops, expected)
    assert result.flops == pytest.approx(float(expected.sum()))
    assert run(own_frame_predictor, num_inference_steps=6).flops is None


def test_a_clip_is_unfinished_until_its_own_last_frame_is_at_one(own_frame_predictor):
    states = states_of(own_frame_predictor, num_inference_steps=10, seed=2, insertion="bernoulli")
    last = states[-1]
    ends = [10 + int(last.born_step[last.frame_clip == clip].max()) for clip in range(3)]
    assert len(set(ends)) > 1
    for state in states:
        assert state.unfinished_clips.tolist() == [state.step < end for end in ends]


class Counted:
    """Costs 1 FLOP a frame and evaluation."""

    def __init__(self, predict):
        self.predict = predict

    def __call__(self, state):
        return self.predict(state)

    def flops(self, state):
        return state.clip_frames.double()


def test_every_state_knows_what_its_clips_have_cost(constant_predictor):
    config = {"num_inference_steps": 5}
    states = states_of(Counted(constant_predictor(rate=0.5)), **config)
    spent = torch.zeros(3, dtype=torch.float64)
    for state in states:
        assert torch.equal(state.clip_flops, spent)
        spent = spent + state.clip_frames
    result = run(Counted(constant_predictor(rate=0.5)), **config)
    assert torch.equal(result.clip_flops, states[-1].clip_flops)
    assert result.flops == float(states[-1].clip_flops.sum()) > 0
    assert run(constant_predictor(rate=0.5), **config).flops is None


def test_an_argument_that_there_is_not_is_rejected(constant_predictor):
    with pytest.raises(TypeError, match="batchsize"):
        sample(constant_predictor(), frame_shape=SHAPE, batchsize=2, config=SamplerConfig())
