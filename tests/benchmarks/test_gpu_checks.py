"""The checks of ``benchmarks/gpu.sh`` can fail: each gets a faulty input, on a CPU."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import attention_checks, block_checks, sampling_checks, zero_checks
from benchmarks.gpu.outcome import CheckFailed
from benchmarks.gpu.scene import Scene
from flowception.generation.kv_cache import KeyValueCache
from flowception.nn import rows

pytestmark = pytest.mark.long


@pytest.fixture
def scene(tmp_path):
    return Scene.of("cpu", tmp_path)


def test_kept_keys_in_a_wrong_place(scene, monkeypatch):
    real = KeyValueCache.attend

    def rolled(self, query, key, value, layout, **named):
        wrong = key.roll(3, 0) if key.dtype == torch.bfloat16 else key  # ours, not the float32 reference
        return real(self, query, wrong, value, layout, **named)

    monkeypatch.setattr(KeyValueCache, "attend", rolled)
    with pytest.raises(CheckFailed, match="with cached keys and values; the error must be at most"):
        sampling_checks.cached_sampling(scene)


def test_a_segment_that_ends_a_token_too_late(scene, monkeypatch):
    real = attention_checks.attention

    def off_by_one(query, key, value, layout):
        first, second, *others = layout.segment_lengths
        return real(query, key, value, replace(layout, segment_lengths=(first + 1, second - 1, *others)))

    monkeypatch.setattr(attention_checks, "attention", off_by_one)
    with pytest.raises(CheckFailed, match="must be below 0.01"):
        attention_checks.against_float64(scene)


def test_a_modulation_whose_gradient_is_two_percent_too_large(scene, monkeypatch):
    real = rows._sum_rows
    monkeypatch.setattr(rows, "_sum_rows", lambda *arguments: 1.02 * real(*arguments))
    with pytest.raises(CheckFailed, match="errors must be below"):
        block_checks.leaves(scene)


def test_blocks_that_are_not_compiled(scene, monkeypatch):
    real = Scene.recipe
    monkeypatch.setattr(Scene, "recipe", lambda self, *words: real(self, *words, "model.compile=off"))
    with pytest.raises(CheckFailed, match="0 graphs"):
        block_checks.whole_blocks(scene)


def test_a_step_of_another_size(scene, monkeypatch):
    """The losses of plain torch, but with 0.9 of the learning rate."""
    case = scene.small()
    batches = [case.batch(step) for step in range(zero_checks.STEPS)]
    right = zero_checks.by_torch(case, "fp32", scene.device, batches)
    monkeypatch.setattr(zero_checks, "_LEARNING_RATE", 0.9 * zero_checks._LEARNING_RATE)
    wrong = zero_checks.by_torch(case, "fp32", scene.device, batches)
    assert max(abs(a - b) / b for a, b in zip(wrong, right)) > zero_checks._LARGEST["bf16"]
