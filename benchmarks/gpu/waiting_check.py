"""Finds where a training step makes the host wait for the GPU, and how busy both are.

A few blocks of the recipe's width are enough: the host cost of a block does not depend on their number.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.block_checks import compiler
from benchmarks.gpu.engine import Training, pinned
from benchmarks.gpu.outcome import MEASURED, Outcome
from benchmarks.gpu.scene import ROOT, Scene, needs_gpu

BLOCKS, WARM_STEPS, PACKS = 4, 2, 2
_SYNC_WORD = "synchronizing"
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


@contextmanager
def sync_sites(found: Counter[str]) -> Iterator[None]:
    """Count operations that wait for the GPU inside the block, by the Python line that called them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(
        f"{short_path(warning.filename)}:{warning.lineno}" for warning in caught if _SYNC_WORD in str(warning.message)
    )


def short_path(name: str) -> str:
    """A source file relative to the repository root, or to its package."""
    path = Path(name)
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    parts = path.parts
    places = [at for at, part in enumerate(parts) if part in ("site-packages", "dist-packages", "site")]
    return str(Path(*parts[places[-1] + 1 :])) if places else path.name


def busy_ms(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (start, stop) in microseconds, in milliseconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e3


def step_profile(events: Sequence[Any]) -> dict[str, Any]:
    """Kernels, their time, launches and waits of a profiled step."""
    on_gpu = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    spans = [(event.time_range.start, event.time_range.end) for event in on_gpu]
    wall_us = max((stop for _, stop in spans), default=0.0) - min((start for start, _ in spans), default=0.0)
    calls = Counter(event.name for event in events if event.device_type == DeviceType.CPU)
    busy = busy_ms(spans)
    return {
        "gpu_busy_ms": busy,
        "gpu_span_ms": wall_us / 1e3,
        "gpu_idle_share": 1 - busy / (wall_us / 1e3) if wall_us else None,
        "kernels": len(on_gpu),
        "launches": sum(calls[name] for name in _LAUNCHES),
        "waits": {name: calls[name] for name in _WAITS if calls[name]},
    }


def waiting(scene: Scene) -> Outcome:
    """Run two warm-up steps, one in sync debug mode, one under the profiler, and one timed."""
    if not scene.on_gpu:
        return needs_gpu("on a CPU there is no GPU to wait for")
    case = scene.recipe(f"model.num_layers={BLOCKS}", "model.compile=blocks", "model.activation_checkpointing=false")
    batches = [pinned(scene, case.batch(step)) for step in range(WARM_STEPS + 1)]
    with compiler(scene):
        training = Training(scene, case, PACKS)
        for batch in batches[:WARM_STEPS]:
            training.timed_step(batch)
        sites: Counter[str] = Counter()
        with sync_sites(sites):
            training.micro_steps(batches[-1])
            training.optimizer_step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
            training.timed_step(batches[-1])
        passes_s, optimizer_s, _ = training.timed_step(batches[-1])
    figures: dict[str, Any] = {"blocks": BLOCKS, "packs": PACKS, "sites": dict(sites.most_common())}
    figures |= step_profile(traced.events())
    figures |= {"passes_ms": passes_s * 1e3, "optimizer_ms": optimizer_s * 1e3}
    said = ", ".join(f"{site} x{count}" for site, count in sites.most_common(6)) or "none"
    idle = figures["gpu_idle_share"]
    return Outcome(
        MEASURED,
        f"{PACKS} packs through {BLOCKS} blocks: {sum(sites.values())} waits at {len(sites)} places ({said}); "
        f"driver's waits {figures['waits']}; {figures['launches']} launches, GPU idle "
        f"{'unknown' if idle is None else f'{idle:.0%}'} when profiled; {figures['passes_ms']:.0f} ms + optimizer "
        f"{figures['optimizer_ms']:.0f} ms without it",
        figures,
    )
