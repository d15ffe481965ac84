"""``benchmarks/gpu.sh --device cpu``: the script itself, with a small network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {
    1: "pass",
    2: "pass",
    3: "pass",
    4: "needs a GPU",
    5: "pass",
    6: "measured",
    7: "needs a GPU",
    8: "pass",
    9: "pass",
    10: "measured",
    11: "needs a GPU",
    12: "pass",
}


@pytest.mark.long
def test_on_a_cpu_every_check_passes_measures_or_says_why_it_needs_a_gpu(tmp_path):
    result, page = tmp_path / "result.json", tmp_path / "page.md"
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--json", result, "--page", page]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    lines = done.stdout.splitlines()[-12:]
    shape = re.compile(r" ?(\d+) (.{24}) (pass|measured|needs a GPU) +(\S.*) \(\d+\.\d s\)")
    found = [shape.fullmatch(line) for line in lines]
    assert all(found), done.stdout + done.stderr
    assert {int(match[1]): match[3] for match in found} == EXPECTED
    assert done.returncode == 0
    written = json.loads(result.read_text())
    assert written["complete"]
    assert written["device"] == "cpu"
    assert [record["number"] for record in written["checks"]] == list(range(1, 13))
    arms = written["checks"][9]["outcome"]["figures"]["arms"]
    assert all(arm["ms_per_pack"] > 0 for arm in arms.values())
    assert arms["blocks compiled, fewest checkpointed"]["graphs"] == 1
    assert [arm["checkpointed_blocks"] for arm in arms.values()] == [2, 0, 2, 0]
    assert "its figures do not apply to GPUs" in page.read_text()


@pytest.mark.long
def test_without_a_gpu_the_default_device_is_rejected():
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    hidden = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch finds no GPU; use --device cpu" in done.stderr
    assert done.stdout == ""
