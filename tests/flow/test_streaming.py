"""Streaming: what is handed out, when, and that together it is the finished clips."""

import pytest
import torch

from flowception.flow import Context, SamplerConfig, sample, sample_states, stream_frames

SHAPE = (2, 3, 2)
N = 8


def oracle(state):
    """Wants clips of 5 + clip number frames; velocity from each frame's own latent."""
    wanted = 5 + torch.arange(len(state.clip_frames))
    missing = (wanted - state.clip_frames).clamp(min=0)
    clip = state.frame_clip
    velocity = state.frames * -0.5 + state.times.float()[:, None, None, None]
    return velocity, (missing / state.clip_frames)[clip].double()


def settings(context=None, **config):
    return {
        "frame_shape": SHAPE,
        "batch_size": 4,
        "config": SamplerConfig(num_inference_steps=N, **config),
        "context": context,
        "seed": 3,
    }


def contexts():
    """Image-to-video, continuation of 3 frames, nothing, interpolation between two."""
    frames = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    return [
        Context(frames=frames[:1], num_start_frames=1),
        Context(frames=frames, num_start_frames=1),
        None,
        Context(frames=frames[:2], active=[True, True], num_start_frames=0),
    ]


@pytest.mark.parametrize("insertion", ["thinning", "poisson", None])
@pytest.mark.parametrize("with_context", [False, True])
def test_what_is_handed_out_is_the_result_in_order_and_never_taken_back(insertion, with_context):
    given = [*contexts()[:3], None] if with_context else None
    arguments = settings(given, insertion=insertion, num_start_frames=2)
    result = sample(oracle, **arguments)
    received = [[] for _ in range(4)]
    for final in stream_frames(sample_states(oracle, **arguments)):
        assert final.first_frame == sum(len(frames) for frames in received[final.clip])
        received[final.clip].append(final.frames.clone())
    for frames, expected in zip(received, result.clips(), strict=True):
        assert torch.equal(torch.cat(frames), expected)


def test_before_the_clock_ends_only_leading_context_is_final():
    early = [f for f in stream_frames(sample_states(oracle, **settings(contexts()))) if f.step < N]
    # An active context frame inserts to its right, never to its left: it is final, the frame after it is not.
    assert [(f.clip, f.first_frame, len(f.frames), f.step) for f in early] == [(0, 0, 1, 0), (1, 0, 3, 0), (3, 0, 1, 0)]


def test_frames_are_handed_out_at_the_first_step_at_which_they_can_be():
    """By hand: a generated frame is final when the slowest frame up to it has had its N steps, and the clock too."""
    states = list(sample_states(oracle, **settings(num_start_frames=2)))
    last = states[-1]
    assert len(set(last.born_step.tolist())) > 4
    seen = {}
    for final in stream_frames(states):
        seen |= {(final.clip, final.first_frame + i): final.step for i in range(len(final.frames))}
    expected = {}
    for clip in range(4):
        born = last.born_step[last.cu_frames[clip] : last.cu_frames[clip + 1]].tolist()
        expected |= {(clip, i): N + max(born[: i + 1]) for i in range(len(born))}
    assert seen == expected


def test_an_autoregressive_clip_is_handed_out_frame_by_frame():
    """Frame i is born when frame i - 1 finishes, after i N steps, and is final after (i + 1) N."""
    config = SamplerConfig(num_inference_steps=N, order="autoregressive", num_start_frames=1)
    states = sample_states(
        oracle, frame_shape=SHAPE, batch_size=2, config=config, num_frames=[3, 5], seed=3,
    )  # fmt: skip
    seen = [(f.clip, f.first_frame, len(f.frames), f.step) for f in stream_frames(states)]
    assert sorted(seen) == [(clip, i, 1, (i + 1) * N) for clip, n in ((0, 3), (1, 5)) for i in range(n)]


@pytest.mark.parametrize("order", ["left_to_right", "hierarchical", "random"])
def test_prescribed_orders_are_handed_out_whole_and_in_order(order):
    config = SamplerConfig(num_inference_steps=N, order=order, num_start_frames=2)
    arguments = {"frame_shape": SHAPE, "batch_size": 2, "config": config, "num_frames": [4, 7], "seed": 3}
    result, received = sample(oracle, **arguments), [[], []]
    for final in stream_frames(sample_states(oracle, **arguments)):
        assert final.first_frame == sum(len(frames) for frames in received[final.clip])
        received[final.clip].append(final.frames)
    for frames, expected in zip(received, result.clips(), strict=True):
        assert torch.equal(torch.cat(frames), expected)
