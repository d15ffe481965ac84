"""The real network as DeepSpeed builds and holds it: ZeRO-3 must not change what it computes."""

from __future__ import annotations

from pathlib import Path

from distributed_worker import run_distributed

WORKER = str(Path(__file__).parent / "network_worker.py")


def test_constants_are_exact_in_a_network_built_under_zero_init_in_bf16():
    """``zero.Init`` patches ``torch.arange`` and its like to give bfloat16, and sampling builds without it."""
    (found,) = run_distributed(WORKER, "constants", 1)
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
