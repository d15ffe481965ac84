"""The recipe for 2 billion parameters on one GPU at ZeRO-3: its speed in four ways.

Model FLOPs are exact (``nn.flops``), of visible frames and their text, recomputation left out. Beside them stands the
count that others report: ``6 N`` a token, N the weights of the blocks that act on every token (modulation acts once a
frame), and ``12 L d n^2`` for the attention of a segment of n tokens.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.block_checks import compiler, graphs
from benchmarks.gpu.children import run_in_child
from benchmarks.gpu.engine import Training, pinned
from benchmarks.gpu.outcome import MEASURED, CheckFailed, Outcome
from benchmarks.gpu.scene import Case, Scene
from flowception.data.loader import StepBatch
from flowception.data.steps import PackPlan
from flowception.nn.backbone import count_parameters
from flowception.training.arrangements import Job
from flowception.training.hardware import GIB, gpu_peak, peak_memory_gib

STEPS, PACKS = 4, 2
OPTIMIZER_PACKS = 8
"""Packs of a step over which its optimizer is spread in the second MFU: the recipe's own on 8 GPUs."""
LARGEST_DIFFERENCE = 2e-2
"""Relative, of a step's velocity loss."""
_ARM_LIMIT_S = 110.0
_CPU_ARM_LIMIT_S = 900.0
_CHECKPOINTED = (0, 8, 16)
"""Blocks checkpointed where none is meant to be, until it fits."""


@dataclass(frozen=True)
class Arm:
    """One way to run the recipe's blocks."""

    name: str
    compile: str
    checkpointed: bool


ARMS = (
    Arm("compile off, all blocks checkpointed", "off", True),
    Arm("leaves compiled", "leaves", True),
    Arm("leaves compiled, no checkpointing", "leaves", False),
    Arm("blocks compiled, no checkpointing", "blocks", False),
)


def peers_flops(case: Case, pack: PackPlan) -> float:
    """A pack's FLOPs as others count theirs; see the module."""
    frames, text = case.pack_clips(pack)
    tokens = text + frames * (case.clip.height * case.clip.width + 1)
    spec = case.config.model.flop_spec()
    layers, size = spec.num_layers, spec.hidden_size
    weights = layers * (4 * size * size + 3 * size * spec.mlp_hidden_size)
    return float(6.0 * weights * tokens.sum() + 12.0 * layers * size * (tokens**2).sum())


def estimated_gib(case: Case, parameters: int) -> float:
    """What the dry run says a rank of one needs, without the EMA, which is not built here."""
    config = case.config
    memory = Job.of(config, parameters).memory(config.zero, 1, config.model.checkpointed_blocks())
    return (memory.total - memory.ema) / GIB


def run_arm(scene: Scene, case: Case, batches: list[StepBatch], found: Path) -> None:
    """One arm in a process of its own; writes what it measured, or that memory was full."""
    parameters = count_parameters(case.config.model)
    figures: dict[str, Any] = {"estimated_gib": estimated_gib(case, parameters), "parameters": parameters}
    try:
        with compiler(scene):
            figures |= _train(scene, case, [pinned(scene, batch) for batch in batches]) | graphs()
    except torch.cuda.OutOfMemoryError as error:
        figures["out_of_memory"] = " ".join(str(error).split())[:160]
    figures["peak_gib"] = peak_memory_gib(scene.device)
    found.write_text(json.dumps(figures))


def _train(scene: Scene, case: Case, batches: list[StepBatch]) -> dict[str, Any]:
    training = Training(scene, case, PACKS)
    if scene.on_gpu:
        torch.cuda.reset_peak_memory_stats(scene.device)
    steps = [training.timed_step(batch) for batch in batches]
    passes_s, optimizer_s = (median(step[part] for step in steps[1:]) for part in range(2))
    return {
        "first_step_s": sum(steps[0][:2]),
        "ms_per_pack": passes_s / PACKS * 1e3,
        "optimizer_ms": optimizer_s * 1e3,
        "losses": [step[2] for step in steps],
    }


def four_ways(scene: Scene) -> Outcome:
    """Run every arm; the figures of those before are kept if one ends badly."""
    plain = scene.recipe()
    batches = [plain.batch(step) for step in range(STEPS)]
    packs = [pack for batch in batches for pack in batch.step_plan.packs]
    parameters = count_parameters(plain.config.model)
    figures: dict[str, Any] = {
        "parameters": parameters,
        "pack_tflop": sum(map(plain.pack_flops, packs)) / len(packs) / 1e12,
        "pack_tflop_peers": sum(peers_flops(plain, pack) for pack in packs) / len(packs) / 1e12,
        "arms": {},
    }
    limit_s = _ARM_LIMIT_S if scene.on_gpu else _CPU_ARM_LIMIT_S
    if not scene.on_gpu:  # once for all arms; with a GPU they could touch it, which no process may that forks
        importlib.import_module("deepspeed")
        importlib.import_module("torch._dynamo")
    for number, arm in enumerate(ARMS):
        figures["arms"][arm.name] = _first_that_fits(scene, arm, batches, limit_s, scene.folder / f"arm_{number}")
        scene.note(Outcome(MEASURED, _said(figures), figures))
    _add_shares(scene, figures)
    failed = [f"{name}: {found['failed']}" for name, found in figures["arms"].items() if "failed" in found]
    failed += _unlike(figures["arms"])
    if failed:
        raise CheckFailed(f"{'; '.join(failed)}; {_said(figures)}", figures)
    return Outcome(MEASURED, _said(figures), figures)


def _unlike(arms: dict[str, dict[str, Any]]) -> list[str]:
    """Arms whose losses are not those of the first, but for bfloat16's rounding: all train the same on the same."""
    losses = {name: found["losses"] for name, found in arms.items() if "losses" in found}
    first: list[float] = next(iter(losses.values()), [])
    return [
        f"{name}: its losses {found} are not {first}"
        for name, found in losses.items()
        if not all(abs(ours - theirs) <= LARGEST_DIFFERENCE * abs(theirs) for ours, theirs in zip(found, first))
    ]


def _first_that_fits(scene: Scene, arm: Arm, batches: list[StepBatch], limit_s: float, place: Path) -> dict[str, Any]:
    """The arm's figures; with more and more blocks checkpointed where it is meant to be none and memory is full."""
    tries: list[dict[str, Any]] = []
    for blocks in ("true",) if arm.checkpointed else _CHECKPOINTED:
        case = scene.recipe(f"model.compile={arm.compile}", f"model.activation_checkpointing={blocks}")
        found, log = place.with_suffix(f".{blocks}.json"), place.with_suffix(f".{blocks}.log")
        ending = run_in_child(partial(run_arm, scene, case, batches, found), limit_s, log, own_group=False)
        if ending.code != 0 or not found.is_file():
            return {"failed": ending.reason(limit_s), "tries": tries}
        figures: dict[str, Any] = json.loads(found.read_text())
        figures["checkpointed_blocks"] = case.config.model.checkpointed_blocks()
        if "out_of_memory" not in figures:
            return figures | ({"tries": tries} if tries else {})
        tries.append(figures)
    return {**tries[-1], "tries": tries[:-1]}


def _add_shares(scene: Scene, figures: dict[str, Any]) -> None:
    """MFU of each arm where the card's peak is known."""
    peak = gpu_peak(torch.cuda.get_device_name(scene.device)) if scene.on_gpu else None
    figures["peak_tflops"] = peak and peak.tflops
    for found in figures["arms"].values():
        if peak is None or "ms_per_pack" not in found:
            continue
        pack_s = found["ms_per_pack"] / 1e3
        whole_s = pack_s + found["optimizer_ms"] / 1e3 / OPTIMIZER_PACKS
        found["mfu"] = figures["pack_tflop"] / pack_s / peak.tflops
        found["mfu_with_optimizer"] = figures["pack_tflop"] / whole_s / peak.tflops
        found["mfu_peers"] = figures["pack_tflop_peers"] / pack_s / peak.tflops


def _said(figures: dict[str, Any]) -> str:
    words = [f"{figures['parameters'] / 1e9:.3g} B, {figures['pack_tflop']:.4g} TFLOP a pack"]
    for name, found in figures["arms"].items():
        if "ms_per_pack" not in found:
            words.append(f"{name}: {'out of memory' if 'out_of_memory' in found else 'failed'}")
            continue
        mfu = f", MFU {found['mfu']:.1%}" if "mfu" in found else ""
        kept = f" ({found['checkpointed_blocks']} blocks had to be)" if found.get("tries") else ""
        words.append(
            f"{name}{kept}: {found['ms_per_pack']:.0f} ms a pack{mfu}, {found['peak_gib']:.1f} GiB "
            f"(estimate {found['estimated_gib']:.1f})"
        )
    return "; ".join(words)
