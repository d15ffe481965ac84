"""Checks of the installation: versions, imports, one collective, and the repository's GPU tests."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from typing import Any

import torch

from benchmarks.gpu.outcome import PASS, CheckFailed, Outcome
from benchmarks.gpu.scene import ROOT, Scene, needs_gpu
from flowception.training.distributed.collectives import all_sum
from flowception.training.distributed.launch import init_distributed
from flowception.training.hardware import gpu_peak

_PACKAGES = ("torch", "triton", "deepspeed", "numpy", "omegaconf", "safetensors", "pydantic")
_MODULES = (
    "flowception.config",
    "flowception.training.trainer",
    "flowception.training.distributed.zero",
    "flowception.training.estimate.report",
    "flowception.generation.kv_cache",
    "train.main",
)
_KERNELS = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
"""FlashAttention versions by their names in torch's registry, and the module of their package."""


def version_of(package: str) -> str:
    """A package's version, or ``none``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def kernels() -> dict[str, str]:
    """State of FlashAttention-3 and -4: ``ready``, ``no package``, or ``not in this torch``."""
    listed: list[str] = []
    with suppress(ImportError):
        from torch.nn.attention import list_flash_attention_impls

        listed = list_flash_attention_impls()
    return {name: _kernel_state(name, module, listed) for name, module in _KERNELS.items()}


def _kernel_state(name: str, module: str, listed: list[str]) -> str:
    if name not in listed:
        return "not in this torch"
    try:
        importlib.import_module(module)
    except ImportError:
        return "no package"
    return "ready"


def environment(scene: Scene) -> Outcome:
    """Import the modules of training, and run one collective."""
    figures: dict[str, Any] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    figures |= {package: version_of(package) for package in _PACKAGES}
    for module in (*_MODULES, "deepspeed"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CheckFailed(f"{module} cannot be imported ({error}); see benchmarks/gpu_wheels.sh", figures) from None
    ranks = init_distributed()
    if (total := all_sum([2.0], ranks.device)) != [2.0]:
        raise CheckFailed(f"the sum of 2 over one rank must be [2.0], got {total}", figures)
    figures["collective"] = torch.distributed.get_backend()
    figures["kernels"] = kernels()
    words = [f"{package} {figures[package]}" for package in ("python", "torch", "deepspeed")]
    if scene.on_gpu:
        properties = torch.cuda.get_device_properties(scene.device)
        peak = gpu_peak(properties.name)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        figures |= {"card": properties.name, "memory_gib": properties.total_memory / 2**30, "nccl": nccl}
        figures["peak_tflops"] = peak and peak.tflops
        words.insert(0, f"{properties.name}, {figures['memory_gib']:.0f} GiB")
        words.append(f"cuda {figures['cuda']}, NCCL {nccl}")
    words.append(f"sum over one rank by {figures['collective']}")
    words.append(", ".join(f"{name}: {state}" for name, state in figures["kernels"].items()))
    return Outcome(PASS, ", ".join(words), figures)


def gpu_tests(scene: Scene) -> Outcome:
    """Run the tests marked ``gpu``, and in parallel the fake-CUDA tests, which need no GPU.

    Only their files are collected, so that the packages of other tests are not needed.
    """
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^@pytest\.mark\.gpu\b", path.read_text(), re.MULTILINE)
    )
    if not scene.on_gpu:
        return needs_gpu(f"tests marked gpu are skipped without CUDA ({len(files)} files)")
    stand_in = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_fake_cuda.py"))
    suites = {"gpu": ["-m", "gpu", *files], "stand-in": stand_in}
    started = {name: _start_pytest(scene, name, words) for name, words in suites.items()}
    found = {name: _pytest_counts(scene, name, process.wait()) for name, process in started.items()}
    said = ", ".join(f"{name}: {counts['said']}" for name, counts in found.items())
    if any(counts["code"] or not counts["passed"] for counts in found.values()):
        failed = [name for counts in found.values() for name in counts["failed"]]
        raise CheckFailed(f"{said}: {', '.join(failed[:5]) or 'see the log'}", found)
    return Outcome(PASS, said, found)


def _start_pytest(scene: Scene, name: str, words: list[str]) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--junitxml={scene.folder / name}.xml",
        *words,
    ]
    with (scene.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=log, stderr=subprocess.STDOUT)


def _pytest_counts(scene: Scene, name: str, code: int) -> dict[str, Any]:
    """Results of a pytest run, from its report."""
    report = scene.folder / f"{name}.xml"
    if not report.is_file():
        raise CheckFailed(f"{name}: pytest exited with {code} before writing its report; check that it is installed")
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts: dict[str, Any] = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    counts["passed"] = counts["tests"] - bad - counts["skipped"]
    said = f"{counts['passed']} passed, {bad} failed, {counts['skipped']} skipped"
    cases = suite.iter("testcase")
    failed = [
        case.get("name", "?") for case in cases if any(case.find(what) is not None for what in ("failure", "error"))
    ]
    return {**counts, "code": code, "failed": failed, "said": said + (f", pytest exited with {code}" if code else "")}
