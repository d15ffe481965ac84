"""Compiled blocks under DeepSpeed, two ranks at every ZeRO stage: what eager blocks train, from one graph."""

import shutil
from pathlib import Path

import pytest
from blocks_worker import TRACED
from distributed_worker import run_distributed

WORKER = str(Path(__file__).parent / "blocks_worker.py")
BOUNDS = {"fp32": {"losses": 1e-6, "norms": 1e-5, "state": 1e-4}, "bf16": {"losses": 0.01, "norms": 0.05, "state": 0.2}}
"""Of each figure's own size; see ``deviations``. In bf16 a moment of a few gradients is as coarse as they are."""

pytestmark = pytest.mark.xdist_group("blocks")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("precision", "backend"), [("fp32", TRACED), ("bf16", TRACED), ("fp32", "inductor")])
def test_every_stage_trains_what_eager_blocks_do(precision, backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    for found in run_distributed(WORKER, "every_stage", 2, timeout_s=1100, precision=precision, backend=backend):
        assert len(found) == 8, "four stages, with and without blocks computed again"
        for case, result in found.items():
            print(precision, backend, case, result)
            assert (result["graphs"], result["breaks"]) == (2, 0), case
            for name, bound in BOUNDS[precision].items():
                assert result[name] < bound, (case, name)


def test_the_list_of_modules_at_work_stays_as_long_as_it_is():
    """DeepSpeed's at ZeRO-3 gained an entry for every checkpointed block of every micro-step."""
    (entries,) = run_distributed(WORKER, "module_stack", 1, micro_steps=200)
    assert len(entries) == 200
    assert set(entries) == {1}
