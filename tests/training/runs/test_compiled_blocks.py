"""Compiled blocks under DeepSpeed on two ranks at every ZeRO stage: same results as eager blocks, from one graph."""

import shutil

import pytest

from tests.distributed_worker import run_distributed
from tests.tracing import TRACED

WORKER = "tests.training.workers.blocks_worker"
BOUNDS = {
    "fp32": {"losses": 1e-5, "norms": 1e-4, "state": 1e-3},
    "bf16": {"losses": 1e-3, "norms": 1e-2, "state": 5e-2},
}
"""Relative tolerances; see ``deviations``. In bf16 a moment of a few gradients is as coarse as they are."""

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.xdist_group("blocks")]


@pytest.mark.parametrize(("precision", "backend"), [("bf16", TRACED), ("fp32", "inductor")])
def test_compiled_blocks_match_eager_ones_at_every_stage(precision, backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    for found in run_distributed(WORKER, "every_stage", 2, timeout_s=1100, precision=precision, backend=backend):
        assert len(found) == 8, "four stages, with and without recomputed blocks"
        for case, result in found.items():
            print(precision, backend, case, result)
            assert (result["graphs"], result["breaks"]) == (2, 0), case
            for name, bound in BOUNDS[precision].items():
                assert result[name] < bound, (case, name)
