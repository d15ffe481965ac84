"""The real network under DeepSpeed: ZeRO-3 must not change what it computes."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.distributed_worker import run_distributed

WORKER = "tests.training.workers.network_worker"
pytestmark = pytest.mark.xdist_group("network")


@pytest.fixture(scope="module")
def found():
    """The network under ZeRO-3 in bf16, one process."""
    return run_distributed(WORKER, "constants", 1)[0]


def test_constants_are_exact_in_a_network_built_under_zero_init_in_bf16(found):
    """``zero.Init`` patches ``torch.arange`` and similar functions to return bfloat16; sampling builds without it."""
    assert found["dtypes"] == ["torch.bfloat16"], "nothing was built in bf16, so nothing is proved"
    assert found["frequency"] == ["float64", True]
    assert found["axis"] == ["int64", True]
    assert found["buffers"] == [], "the engine casts buffers to bf16: compare them here too"
    assert found["also_alone"]
    assert found["equal"] == dict.fromkeys(
        [
            "time_embedding.mlp",
            "embedding.insertion.counts.mlp",
            "embedding.latent",
            "rotations of block 0",
            "rotations of block 1",
        ],
        True,
    )


def test_log_rates_are_float32_and_learn_under_zero_3_in_bf16(found):
    """The rate head casts its weights after ZeRO-3 has gathered them; gradients must reach the partitions."""
    here, alone = found["one_step"]
    log_rate = torch.tensor(here["log_rate"])
    assert (log_rate != log_rate.bfloat16().float()).float().mean() > 0.9
    torch.testing.assert_close(log_rate, torch.tensor(alone["log_rate"]), rtol=0.0, atol=0.02)
    assert here["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.02)


def test_compiled_blocks_under_zero_3_match_eager_ones(found):
    here, compiled = found["one_step"][0], found["compiled"]
    assert compiled["graphs"] == 1
    for head in ("velocity", "log_rate"):
        torch.testing.assert_close(torch.tensor(compiled[head]), torch.tensor(here[head]), rtol=0.0, atol=0.02)
    assert compiled["grad_norm"] == pytest.approx(here["grad_norm"], rel=0.02)


def test_deepspeed_s_module_stack_does_not_grow(found):
    """Without the reset it gains an entry for every checkpointed block of every micro-step."""
    assert len(found["module_stack"]) == 200
    assert set(found["module_stack"]) == {1}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on a CPU needs a C++ compiler",
)
def test_compiled_leaves_are_safe_under_zero_3():
    """Weights are released after each forward pass and gathered again for the backward pass; compiled code must handle
    that."""
    (steps,) = run_distributed(WORKER, "compiled", 1, timeout_s=1100)
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.05)):
        eager = steps[f"eager {precision}"]
        for way in ("compiled", "again"):
            step = steps[f"{way} {precision}"]
            for head in ("velocity", "log_rate"):
                torch.testing.assert_close(
                    torch.tensor(step[head]), torch.tensor(eager[head]), rtol=0.0, atol=tolerance
                )
            assert step["grad_norm"] == pytest.approx(eager["grad_norm"], rel=tolerance)
