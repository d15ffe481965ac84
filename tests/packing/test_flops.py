"""The FLOP counter, compared with torch's counter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowception.nn import FlowceptionDiT, ModelSpec, attention_flops, clip_flops, training_flops
from flowception.packing.flops import attention_pairs


def traced(model, pack, *, backward=False):
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = model(pack)
        if backward:
            (output.velocity.sum() + output.log_rate.sum()).backward()
    return counter.get_total_flops()


def counted(count, spec, clips):
    columns = np.array(clips).T
    return count(spec, *columns).sum()


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize(("count_embedding", "grid_embedding"), [(True, True), (False, True), (True, False)])
def test_flops_of_a_tight_pack_are_those_that_torch_counts(
    small_config, mixed_clips, make_pack, with_text, count_embedding, grid_embedding
):
    config = replace(small_config, count_embedding=count_embedding, grid_embedding=grid_embedding)
    clips = mixed_clips
    if not with_text:
        config.text_dim, clips = 0, [clip._replace(text_tokens=0) for clip in mixed_clips]
    expected = traced(FlowceptionDiT(config).initialize(0), make_pack(clips, with_text=with_text))
    assert counted(clip_flops, config.spec(), clips) == pytest.approx(expected, rel=5e-3)


def test_training_is_three_forwards(model, mixed_clips, make_pack):
    pack = make_pack(mixed_clips)
    pack.noisy.requires_grad_()
    expected = traced(model, pack, backward=True)
    assert counted(training_flops, model.spec, mixed_clips) == pytest.approx(expected, rel=0.05)


SPEC = ModelSpec(hidden_size=8, num_layers=3, num_heads=2, in_channels=4, mlp_hidden_size=32)


def test_attention_is_four_n_squared_d_a_layer():
    assert attention_flops(SPEC, 5, 2, 3, 1) == 3 * 4 * 36**2 * 8


@pytest.mark.parametrize(
    "pattern", [("full", None), ("causal", None), ("window", 1), ("window", 3), ("window", 40)], ids=str
)
def test_attention_counts_the_pairs_of_a_dense_mask(pattern):
    """Pair by pair: text sees text (and all see text), frames see frames by the pattern."""
    name, window = pattern
    spec = replace(SPEC, attention_pattern=name, attention_window_frames=window)
    for frames, height, width, text in [(1, 2, 3, 0), (2, 1, 1, 4), (5, 2, 2, 1), (9, 1, 2, 3), (0, 1, 1, 2)]:
        ranks = [-1] * text + [frame for frame in range(frames) for _ in range(height * width + 1)]
        pairs = 0
        for q in ranks:
            for k in ranks:
                seen = name == "full" or k < 0 or (q >= 0 and (k <= q if name == "causal" else abs(q - k) <= window))
                pairs += seen
        assert attention_pairs(spec, frames, height, width, text) == pairs
        attended = 4 * pairs * spec.hidden_size * spec.num_layers
        assert attention_flops(spec, frames, height, width, text) == attended
        full = clip_flops(SPEC, frames, height, width, text) - attention_flops(SPEC, frames, height, width, text)
        assert clip_flops(spec, frames, height, width, text) == pytest.approx(full + attended, rel=1e-12)


def test_a_complete_index_is_counted_in_one_call():
    frames, height = np.array([[1], [7]]), np.array([2, 3, 4])
    table = clip_flops(SPEC, frames, height, 5)
    assert table.shape == (2, 3)
    assert table.dtype == np.float64
    assert table[1, 2] == clip_flops(SPEC, 7, 4, 5)


def test_modulation_is_counted_by_the_frame():
    one, two = (clip_flops(SPEC, frames, 0, 0) - attention_flops(SPEC, frames, 0, 0) for frames in (1, 2))
    per_token = 2 * ((2 * 4 + 32) * 8 + 3 * (4 * 64 + 3 * 8 * 32) + 8 * 4)
    per_frame = two - one - per_token
    modulation = 2 * (3 * 6 + 2) * 64
    embeddings_and_rate = 2 * (256 * 8 + 64 + 128 * 8 + 64 + 64 + 8)
    assert per_frame == modulation + embeddings_and_rate


def test_count_works_for_a_network_as_large_as_2b():
    with torch.device("meta"):
        spec = ModelSpec(
            hidden_size=1536, num_layers=38, num_heads=24, in_channels=128, mlp_hidden_size=4096, text_dim=4096
        )
    linear = clip_flops(spec, 19, 16, 24, 128) - attention_flops(spec, 19, 16, 24, 128)
    tokens = 19 * 385 + 128
    assert linear / tokens == pytest.approx(2 * 12 * 1536**2 * 38, rel=0.02)
