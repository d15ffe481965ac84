"""Sampling on ``cuda`` without a GPU: frames are there, everything else on the CPU, and every transfer is listed."""

import pytest
import torch

from flowception.flow import Context, SamplerConfig, sample
from flowception.generation.kv_cache import CachedPredictor
from flowception.generation.predictor import NetworkPredictor
from tests.fake_cuda import DEVICE, FakeCuda, content

FRAME_SHAPE = (12, 3, 2)
N = 2
STEP = {
    "to device: flow/sampler_state.py:initial_state (_to_copy)",
    "to host: generation/predictor.py:NetworkPredictor.build_pack (_to_copy)",
    "to device: packing/layout.py:HoldsTensors.to.<lambda> (_to_copy)",
    "to device: nn/rope.py:VideoRoPE._constants (_to_copy)",
    "to device: generation/predictor.py:NetworkPredictor.__call__ (_to_copy)",
    "to device: generation/predictor.py:velocity_frames (_to_copy)",
    "to device: flow/sampler.py:_move (_to_copy)",
}
"""A step builds its pack on the CPU from device frames, and sends it and the output indices to the device."""
INSERTION = {
    "to host: flow/sampler.py:_insertion_counts (_to_copy)",
    "to device: flow/sampler.py:_insert (_to_copy)",
}
"""The CPU draws insertions from the rates; new noise and new frame indices go to the device."""
CACHE = {
    "to device: generation/kv_cache.py:CachedPredictor._evaluate (_to_copy)",
    "to device: generation/kv_cache.py:CachedPredictor._begin_step (_to_copy)",
}
"""Indices of live and cached tokens."""


def texts_of(model):
    generator = torch.Generator().manual_seed(5)
    if model.spec.text_dim is None:
        return {}
    texts = [torch.randn(1 + i, model.spec.text_dim, generator=generator) for i in range(2)]
    return {"texts": texts, "null_text": torch.randn(2, model.spec.text_dim, generator=generator)}


def sampled(predictor, device, **changes):
    """Two clips, one with a context frame; they finish at different steps."""
    config = {"num_inference_steps": N, "num_start_frames": 2, "max_frames": 3, **changes}
    return sample(
        predictor,
        frame_shape=FRAME_SHAPE,
        batch_size=2,
        config=SamplerConfig(**config),
        context=[Context(frames=torch.full((1, *FRAME_SHAPE), 0.3)), None],
        seed=3,
        device=device,
    )


SETTINGS = {
    "plain": (NetworkPredictor, None, {}),
    "guided, autocast": (NetworkPredictor, torch.bfloat16, {"guidance": 1.5, "rate_guidance": 1.2}),
    "finished frames kept, autocast": (CachedPredictor, torch.bfloat16, {"refresh_steps": 2}),
    "kept and guided": (CachedPredictor, None, {"refresh_steps": 2, "guidance": 1.5}),
}
"""Predictor, precision and settings; with text if guided."""


@pytest.mark.parametrize("name", SETTINGS)
def test_sampling_matches_the_cpu_with_known_transfers_only(make_model, name):
    kind, autocast, settings = SETTINGS[name]
    text_dim = 5 if "guidance" in settings else None
    model = make_model(text_dim=text_dim, num_layers=1)
    settings = {**settings, **texts_of(model)}
    on_cpu = sampled(kind(model, [1, 2], **settings), "cpu")
    with FakeCuda() as cuda:
        there = cuda.to_cuda(make_model(text_dim=text_dim, num_layers=1))
        result = sampled(kind(there, [1, 2], autocast_dtype=autocast, **settings), DEVICE)
    assert set(cuda.crossings) == STEP | INSERTION | (CACHE if kind is CachedPredictor else set())
    assert result.frames.device == DEVICE
    assert on_cpu.evaluations > N, "some frame must be inserted"
    assert torch.equal(result.born_at, on_cpu.born_at)
    tolerance = 0.05 if autocast else 1e-5
    torch.testing.assert_close(content(result.frames), on_cpu.frames, rtol=tolerance, atol=tolerance)
    assert torch.equal(result.clip_flops, on_cpu.clip_flops)


def test_a_prescribed_order_does_not_read_the_rates(make_model):
    changes = {"order": "left_to_right", "num_frames": 3}
    model = make_model(num_layers=1)
    on_cpu = sampled(NetworkPredictor(model, [1, 2]), "cpu", **changes)
    with FakeCuda() as cuda:
        there = cuda.to_cuda(make_model(num_layers=1))
        result = sampled(NetworkPredictor(there, [1, 2]), DEVICE, **changes)
    assert set(cuda.crossings) == STEP | {"to device: flow/sampler.py:_insert (_to_copy)"}
    torch.testing.assert_close(content(result.frames), on_cpu.frames, rtol=1e-5, atol=1e-5)
