"""The network as a predictor: a pack of many clips equals the model on each clip, with the correct inputs."""

import dataclasses

import pytest
import torch

from flowception.flow import Context, SamplerConfig, sample
from flowception.generation.predictor import NetworkPredictor
from flowception.nn import ClipShape, ModelRole, PackInput, build_layout, clip_flops

FRAME_SHAPE = (12, 3, 2)


def one_clip(model, frames, condition, times, roles, label):
    """Velocity [n, C, H, W] and rate [n] of one clip, with its pack laid out explicitly."""
    count, channels, height, width = frames.shape
    layout = build_layout([ClipShape(count, height, width)])
    noisy, clean, at = torch.zeros(len(layout.token_kind), channels), torch.zeros(len(layout.token_kind), channels), 0
    for frame in range(count):
        for row in range(height):
            for column in range(width):
                noisy[at], clean[at] = frames[frame, :, row, column], condition[frame, :, row, column]
                at += 1
        at += 1  # the insertion token
    pack = PackInput(
        layout=layout, noisy=noisy, condition=clean, time=torch.tensor(times), role=torch.tensor(roles),
        class_label=torch.tensor([label]), text=None,
    )  # fmt: skip
    output = model(pack)
    velocity = torch.zeros_like(frames)
    at = 0
    for frame in range(count):
        for row in range(height):
            for column in range(width):
                velocity[frame, :, row, column] = output.velocity[at]
                at += 1
        at += 1
    return velocity, output.log_rate.exp()


def test_a_pack_of_clips_equals_the_model_on_each_clip(model, make_state):
    state = make_state([3, 2, 1], contexts=[0, 1, 2], step=4)
    velocity, rate = NetworkPredictor(model, [0, 2, -1])(state)
    generated, active, passive = (int(role) for role in ModelRole)
    cases = (
        (slice(0, 3), [0.4] * 3, [generated] * 3, 0),
        (slice(3, 6), [0.4] * 3, [active, generated, generated], 2),
        (slice(6, 9), [0.4] * 3, [passive, active, generated], -1),
    )
    for here, times, roles, label in cases:
        expected = one_clip(model, state.frames[here], state.condition[here], times, roles, label)
        torch.testing.assert_close(velocity[here], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rate[here], expected[1], atol=1e-5, rtol=1e-5)


def test_only_context_frames_see_the_clock(model, make_state):
    state = make_state([2], contexts=[1], step=6, time_shift=3.0)
    state = dataclasses.replace(state, born_step=torch.tensor([0, 0, 5]))
    pack = NetworkPredictor(model, [0]).build_pack(state)
    shifted = [t / (t + 3 * (1 - t)) for t in (0.6, 0.1)]
    assert pack.time.tolist() == pytest.approx([0.6, *shifted])
    assert pack.role.tolist() == [ModelRole.ACTIVE, ModelRole.GENERATED, ModelRole.GENERATED]


def test_a_context_frame_is_clean_in_both_halves(model, make_state):
    state = make_state([1], contexts=[1])
    pack = NetworkPredictor(model, [0]).build_pack(state)
    cells = FRAME_SHAPE[1] * FRAME_SHAPE[2]
    clean = state.frames[0].permute(1, 2, 0).reshape(cells, -1)
    assert torch.equal(pack.noisy[:cells], clean)
    assert torch.equal(pack.condition[:cells], clean)
    assert not pack.condition[cells:].any()


def test_guidance_extrapolates_from_the_null_class(model, make_state):
    state = make_state([2, 3], contexts=[1, 0], step=3)
    conditional = NetworkPredictor(model, [1, 2])(state)
    null = NetworkPredictor(model, [-1, -1])(state)
    velocity, rate = NetworkPredictor(model, [1, 2], guidance=4.0, rate_guidance=0.5)(state)
    torch.testing.assert_close(velocity, null[0] + 4.0 * (conditional[0] - null[0]), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(rate, (null[1] * conditional[1]).sqrt(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(conditional[0], null[0], atol=1e-3)


def test_guidance_does_not_change_the_rate_by_default(model, make_state):
    state = make_state([3], step=2)
    plain = NetworkPredictor(model, [1])(state)[1]
    torch.testing.assert_close(NetworkPredictor(model, [1], guidance=7.0)(state)[1], plain, atol=1e-5, rtol=1e-5)


def test_guidance_is_one_call_of_the_model(model, make_state):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    NetworkPredictor(model, [1, 2], guidance=2.0)(make_state([2, 2]))
    handle.remove()
    assert calls == [1]


def test_text_precedes_its_clip_and_is_null_text_in_the_unconditional_half(make_model, make_state):
    model = make_model(text_dim=16)
    texts, null = [torch.randn(5, 16), torch.randn(0, 16)], torch.randn(2, 16)
    predictor = NetworkPredictor(model, [0, 1], texts=texts, null_text=null, guidance=2.0)
    state = make_state([2, 2], contexts=[0, 1])
    pack = predictor.build_pack(state)
    frame = FRAME_SHAPE[1] * FRAME_SHAPE[2] + 1
    assert pack.layout.segment_lengths == (5 + 2 * frame, 3 * frame, 2 + 2 * frame, 2 + 3 * frame)
    assert torch.equal(pack.text, torch.cat([texts[0], null, null]))
    guided = predictor(state)[0]
    with_text = NetworkPredictor(model, [0, 1], texts=texts)(state)[0]
    without = NetworkPredictor(model, [-1, -1], texts=[null] * 2)(state)[0]
    torch.testing.assert_close(guided, 2 * with_text - without, atol=2e-5, rtol=1e-4)
    no_text = NetworkPredictor(model, [0, 1], texts=[texts[1]] * 2)(state)[0]
    assert not torch.allclose(no_text[:2], with_text[:2], atol=1e-4)
    torch.testing.assert_close(no_text[2:], with_text[2:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="null_text"):
        NetworkPredictor(model, [0, 1], texts=texts, guidance=2.0)


def test_labels_must_match_the_clips(model, make_state):
    with pytest.raises(ValueError, match="2 clips, the predictor has 1 class labels"):
        NetworkPredictor(model, [0])(make_state([1, 1]))


@pytest.mark.parametrize("scales", [{}, {"guidance": 1.5}, {"guidance": 1.5, "rate_guidance": 0.7}])
def test_a_clip_alone_equals_the_same_clip_in_a_batch(model, scales):
    config = SamplerConfig(num_inference_steps=6, num_start_frames=2, max_frames=12)
    contexts = [Context(frames=torch.full((1, *FRAME_SHAPE), 0.1 * i)) for i in range(3)]

    def run(labels, contexts, seed):
        predict = NetworkPredictor(model, labels, **scales)
        return sample(
            predict, frame_shape=FRAME_SHAPE, batch_size=len(labels), config=config, context=contexts, seed=seed
        )

    batch = run([0, 1, 2], contexts, seed=10)
    alone = run([1], contexts[1:2], seed=11)
    assert len(alone.frames) > 3, "something must have been inserted for this to say anything"
    torch.testing.assert_close(batch.clips()[1], alone.frames, atol=1e-4, rtol=0)
    here = slice(int(batch.cu_frames[1]), int(batch.cu_frames[2]))
    assert torch.equal(batch.born_at[here], alone.born_at)
    assert float(batch.clip_flops[1]) == float(alone.clip_flops[0])


def test_the_context_frame_is_unchanged(model):
    clean = torch.randn(1, *FRAME_SHAPE)
    result = sample(
        NetworkPredictor(model, [0]), frame_shape=FRAME_SHAPE, batch_size=1,
        config=SamplerConfig(num_inference_steps=4), context=[Context(frames=clean)], seed=3,
    )  # fmt: skip
    assert torch.equal(result.frames[:1], clean)


def test_finished_clips_are_skipped(model, make_state):
    state = dataclasses.replace(make_state([2, 2, 2]), step=14)
    state = dataclasses.replace(state, born_step=torch.tensor([0, 0, 0, 9, 0, 0]))
    predictor = NetworkPredictor(model, [0, 1, 2])
    assert predictor.build_pack(state).layout.clip_frames.tolist() == [2]
    velocity, rate = predictor(state)
    clip = slice(2, 4)
    expected = one_clip(model, state.frames[clip], state.condition[clip], [1.0, 0.5], [0] * 2, 1)
    torch.testing.assert_close(velocity[clip], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rate[clip], expected[1], atol=1e-5, rtol=1e-5)
    assert not velocity[:2].any()
    assert not velocity[4:].any()
    assert predictor.flops(state).tolist() == [0, pytest.approx(float(clip_flops(model.spec, 2, 3, 2))), 0]
