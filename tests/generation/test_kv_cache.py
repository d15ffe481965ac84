"""Cached keys and values of finished frames: results and cost."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowception.errors import ConfigError
from flowception.flow import Context, SamplerConfig, sample, sample_states
from flowception.generation.kv_cache import CachedPredictor, narrow_pack
from flowception.generation.predictor import NetworkPredictor, velocity_frames
from flowception.nn import ClipShape, PackInput, build_layout
from tests.nn.varlen_on_cpu import choose_varlen

FRAME_SHAPE = (12, 3, 2)
N = 6
NEVER = 1000
"""A refresh period that no clip reaches: the clock's last step is the last to compute all frames."""


def arguments(predict, labels, seed=10):
    """Image-to-video, without context for class 2; clips finish at different steps, some at the cap."""
    images = [Context(frames=torch.full((1, *FRAME_SHAPE), 0.1 * (label + 1))) for label in labels]
    return {
        "predict": predict,
        "frame_shape": FRAME_SHAPE,
        "batch_size": len(labels),
        "config": SamplerConfig(num_inference_steps=N, num_start_frames=2, max_frames=6),
        "context": [None if label == 2 else image for label, image in zip(labels, images)],
        "seed": seed,
    }


def texts_for(model, labels):
    generator = torch.Generator().manual_seed(5)
    width = model.spec.text_dim
    if width is None:
        return {}
    texts = [torch.randn(3 + i, width, generator=generator) for i in range(len(labels))]
    return {"texts": texts, "null_text": torch.randn(2, width, generator=generator)}


@pytest.mark.parametrize("text_dim", [None, 16])
@pytest.mark.parametrize("guidance", [None, 1.5])
def test_refreshing_in_every_step_is_the_plain_sampler(make_model, text_dim, guidance):
    model, labels = make_model(text_dim=text_dim), [0, 1, 2]
    settings = {**texts_for(model, labels), "guidance": guidance, "rate_guidance": guidance}
    plain = sample(**arguments(NetworkPredictor(model, labels, **settings), labels))
    cached = sample(**arguments(CachedPredictor(model, labels, refresh_steps=1, **settings), labels))
    assert plain.evaluations > N, "some frame must be inserted"
    assert torch.equal(cached.born_at, plain.born_at)
    torch.testing.assert_close(cached.frames, plain.frames, atol=1e-5, rtol=0)
    assert torch.equal(cached.clip_flops, plain.clip_flops)


@pytest.mark.parametrize("refresh_steps", [2, NEVER])
def test_a_clip_is_the_same_alone_or_in_a_batch(model, refresh_steps):
    labels = [0, 1, 2]
    settings = {"refresh_steps": refresh_steps, "guidance": 1.5, "rate_guidance": 0.7}
    batch = sample(**arguments(CachedPredictor(model, labels, **settings), labels))
    ends = [float(batch.born_at[a:b].max()) for a, b in zip(batch.cu_frames, batch.cu_frames[1:])]
    assert len(set(ends)) > 1, "clips must finish at different steps for this to say anything"
    for clip in range(3):
        predict = CachedPredictor(model, labels[clip : clip + 1], **settings)
        alone = sample(**arguments(predict, labels[clip : clip + 1], seed=10 + clip))
        torch.testing.assert_close(batch.clips()[clip], alone.frames, atol=1e-4, rtol=0)
        assert float(batch.clip_flops[clip]) == pytest.approx(float(alone.clip_flops[0]), rel=1e-12)


def test_with_one_layer_cached_frames_equal_their_last_step(make_model):
    """With one block, the keys of a finished frame depend only on that frame, so the cache is exact."""
    model, labels = make_model(num_layers=1), [0]
    plain, frozen = NetworkPredictor(model, labels), CachedPredictor(model, labels, refresh_steps=NEVER)
    states = list(sample_states(**arguments(plain, labels)))
    before, now = states[N - 1], states[N]
    assert len(before.roles) == len(now.roles), "a frame born in the clock's last step would change ranks and counts"
    still = ~now.moving
    assert still.sum() == 3, "the image and both start frames"
    frozen(before)
    velocity = frozen(now)[0]
    pack, earlier = plain.build_pack(now), plain.build_pack(before)
    kept = still[pack.layout.token_frame]
    pack.noisy[kept], pack.time[still] = earlier.noisy[kept], earlier.time[still]
    exact = velocity_frames(model(pack).velocity, pack.layout, now.frames)
    torch.testing.assert_close(velocity[now.moving], exact[now.moving], atol=1e-5, rtol=0)
    fresh = plain(now)[0]
    assert (velocity - fresh)[now.moving].abs().max() > 1e-4, "the last step moves frames, or this says nothing"


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_cached_keys_go_through_the_variable_length_kernel(model, monkeypatch, guidance):
    """As on CUDA, where the kernel requires the same number of segments in queries and keys."""
    labels = [0, 1, 2]
    settings = {"refresh_steps": NEVER, "guidance": guidance}
    reference = sample(**arguments(CachedPredictor(model, labels, **settings), labels))
    choose_varlen(monkeypatch)
    found = sample(**arguments(CachedPredictor(model, labels, **settings), labels))
    assert found.evaluations > N, "frames must be finished before others"
    torch.testing.assert_close(found.frames, reference.frames, atol=1e-4, rtol=0)


def test_the_cache_is_an_approximation_that_refreshing_improves(model):
    labels = [0, 1]
    plain = sample(**arguments(NetworkPredictor(model, labels), labels))

    def error(refresh_steps):
        predict = CachedPredictor(model, labels, refresh_steps=refresh_steps)
        return float((sample(**arguments(predict, labels)).frames - plain.frames).abs().max())

    assert 0 < error(2) < error(NEVER)


@pytest.mark.parametrize("text_dim", [None, 16])
@pytest.mark.parametrize("guidance", [None, 1.5])
@pytest.mark.parametrize("refresh_steps", [None, 1, 2, NEVER])
def test_flops_are_those_that_torch_counts(make_model, refresh_steps, guidance, text_dim):
    model, labels = make_model(text_dim=text_dim), [0, 1, 2]
    settings = {**texts_for(model, labels), "guidance": guidance}
    if refresh_steps is None:
        predict = NetworkPredictor(model, labels, **settings)
    else:
        predict = CachedPredictor(model, labels, refresh_steps=refresh_steps, **settings)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        result = sample(**arguments(predict, labels))
    pooling = 0
    if text_dim is not None:  # the mean over a clip's text is not counted, see tests/packing/test_flops.py
        pooling = 5e-3 * result.flops
    assert result.flops == pytest.approx(counter.get_total_flops(), abs=pooling, rel=1e-9)


def test_finished_frames_are_not_recomputed(model):
    labels = [0, 1, 2]
    plain = sample(**arguments(NetworkPredictor(model, labels), labels))
    costs = [sample(**arguments(CachedPredictor(model, labels, refresh_steps=r), labels)).flops for r in (1, 2, NEVER)]
    assert plain.flops == costs[0] > costs[1] > costs[2]
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0].layout.frame_rank)))
    last = list(sample_states(**arguments(CachedPredictor(model, labels, refresh_steps=NEVER), labels)))
    handle.remove()
    # Every frame is computed until the clock ends, then only the moving ones.
    assert seen == [int(s.moving.sum()) if s.step >= N else len(s.roles) for s in last[:-1]]


def test_a_narrow_pack_keeps_ranks_and_counts():
    layout = build_layout([ClipShape(3, 1, 2, 2), ClipShape(2, 1, 2, 1)])
    tokens, frames = len(layout.token_kind), 5
    pack = PackInput(
        layout=layout, noisy=torch.arange(tokens).float()[:, None], condition=torch.zeros(tokens, 1),
        time=torch.arange(frames) / 10, role=torch.zeros(frames, dtype=torch.int64),
        class_label=torch.tensor([0, 1]), text=torch.zeros(3, 4),
    )  # fmt: skip
    narrow, places = narrow_pack(pack, torch.tensor([False, True, True, False, True]), with_text=False)
    # Clip 0: 2 text, then frames of 3 tokens at 2, 5, 8. Clip 1: 1 text at 11, frames at 12 and 15.
    assert places.tolist() == [5, 6, 7, 8, 9, 10, 15, 16, 17]
    assert narrow.noisy.flatten().tolist() == places.tolist()
    assert narrow.layout.segment_lengths == (6, 3)
    assert narrow.layout.cu_seqlens.tolist() == [0, 6, 9]
    assert narrow.layout.frame_rank.tolist() == [1, 2, 1]
    assert narrow.layout.clip_frames.tolist() == [3, 2]
    assert narrow.layout.token_frame.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert narrow.layout.insertion_token.tolist() == [2, 5, 8]
    assert narrow.time.tolist() == pytest.approx([0.1, 0.2, 0.4])
    assert narrow.text.shape == (0, 4)


def test_steps_must_follow_one_another(model):
    labels = [0, 1, 2]
    states = list(sample_states(**arguments(NetworkPredictor(model, labels), labels)))
    with pytest.raises(ValueError, match=f"evaluate every step from the clock's last \\({N - 1}\\)"):
        CachedPredictor(model, labels, refresh_steps=4)(states[N + 1])
    with pytest.raises(ConfigError, match="`cache_refresh` must be an integer >= 1, or null for no cache, got 0"):
        CachedPredictor(model, labels, refresh_steps=0)


def test_other_attention_patterns_are_refused(make_model):
    model = make_model(attention_pattern="causal")
    with pytest.raises(ConfigError, match="requires .*attention_pattern=full, got attention_pattern=causal"):
        CachedPredictor(model, [0], refresh_steps=4)
