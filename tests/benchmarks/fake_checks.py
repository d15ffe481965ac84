"""Checks with every possible outcome, for the tests of the runner of ``benchmarks/gpu.sh``."""

from __future__ import annotations

import os
import signal
import subprocess
import threading

from benchmarks.gpu.children import run_in_child
from benchmarks.gpu.outcome import MEASURED, PASS, CheckFailed, Outcome
from benchmarks.gpu.scene import needs_gpu


def passes(scene):
    return Outcome(PASS, f"on {scene.device}", {"answer": 42})


def needs(scene):
    return needs_gpu("a reason")


def fails(scene):
    raise CheckFailed("the answer is 41, not 42", {"answer": 41})


def raises(scene):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def prints_from_a_child_of_its_own(scene):
    ending = run_in_child(lambda: print("the inner one was here"), 600, scene.folder / "inner.log", own_group=False)
    print("and so was the outer one", flush=True)
    return Outcome(PASS, f"{ending.code}, {ending.last_line}")


def raises_where_nothing_can_be_printed(scene):
    os.close(1)
    os.close(2)
    print("lost")
    raise RuntimeError("lost too")


def hangs(scene):
    threading.Event().wait()


def hangs_with_a_child(scene):
    child = subprocess.Popen(["sleep", "1000"])
    (scene.folder.parent / "child.pid").write_text(str(child.pid))
    child.wait()


def notes_and_is_killed(scene):
    scene.note(Outcome(MEASURED, "one of two arms took 3 ms", {"first_ms": 3.0}))
    os.kill(os.getpid(), signal.SIGKILL)
