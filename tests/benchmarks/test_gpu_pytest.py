"""Check 4 of ``benchmarks/gpu.sh``: two runs of pytest, counted separately."""

import subprocess
import sys

import pytest

from benchmarks.gpu import environment
from benchmarks.gpu.outcome import CheckFailed
from benchmarks.gpu.scene import Scene

PASSING = '<testcase name="one"/>'
FAILING = '<testcase name="broken"><failure/></testcase>'
SKIPPED = '<testcase name="three"><skipped/></testcase>'
BROKEN_FIXTURE = '<testcase name="four"><error/></testcase>'


def run_pretended(monkeypatch, folder, gpu, stand_in):
    """The check for the reports of two pytest runs: test cases as XML, or None for no report."""
    reports, asked = {"gpu": gpu, "stand-in": stand_in}, {}

    def start(scene, name, words):
        asked[name] = words
        cases = reports[name]
        if cases is not None:
            counts = {"failures": "<failure", "errors": "<error", "skipped": "<skipped"}
            counts = " ".join(f'{key}="{cases.count(tag)}"' for key, tag in counts.items())
            report = (
                f'<testsuites><testsuite tests="{cases.count("<testcase")}" {counts}>{cases}</testsuite></testsuites>'
            )
            (scene.folder / f"{name}.xml").write_text(report)
        bad = cases is None or "<failure" in cases or "<error" in cases
        return subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({int(bad)})"])

    monkeypatch.setattr(environment, "_start_pytest", start)
    outcome = environment.gpu_tests(Scene.of("cuda", folder))
    assert asked["gpu"][:2] == ["-m", "gpu"]
    assert "tests/nn/test_attention.py" in asked["gpu"]
    assert len(asked["stand-in"]) == 4
    assert all(name.endswith("test_fake_cuda.py") for name in asked["stand-in"])
    return outcome


def test_both_are_counted(tmp_path, monkeypatch):
    outcome = run_pretended(monkeypatch, tmp_path, PASSING + SKIPPED, 2 * PASSING)
    assert outcome.verdict == "pass"
    assert outcome.summary == "gpu: 1 passed, 0 failed, 1 skipped, stand-in: 2 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize(
    ("gpu", "stand_in", "said"),
    [
        (PASSING + FAILING, PASSING, "gpu: 1 passed, 1 failed, 0 skipped, pytest exited with 1, stand-in: .*: broken"),
        (PASSING, BROKEN_FIXTURE, "gpu: 1 passed, .*, stand-in: 0 passed, 1 failed, .* exited with 1: four"),
        (SKIPPED, PASSING, "gpu: 0 passed, 0 failed, 1 skipped, stand-in: 1 passed"),
        (None, PASSING, "gpu: pytest exited with 1 before writing its report"),
    ],
)
def test_neither_may_fail_or_be_skipped_altogether(gpu, stand_in, said, tmp_path, monkeypatch):
    with pytest.raises(CheckFailed, match=said):
        run_pretended(monkeypatch, tmp_path, gpu, stand_in)
