"""Speed of the 2-billion-parameter recipe on one GPU at ZeRO-3, in four variants (arms), most informative first.

Each arm is measured in a separate process, forked from one that has imported DeepSpeed. Arms without full checkpointing
checkpoint as few blocks as the dry run's estimate allows on the card, like ``activation_checkpointing: auto`` in the
recipe, and more if that still runs out of memory.

Model FLOPs are exact (``packing.flops``), for visible frames and their text, without recomputation. The second count is
the one that others report: ``6 N`` per token, N the block weights that act on every token (modulation acts once per
frame), and ``12 L d n^2`` for the attention of a segment of n tokens.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.block_checks import compiler, graphs
from benchmarks.gpu.children import run_in_child
from benchmarks.gpu.engine import Training, pinned
from benchmarks.gpu.outcome import MEASURED, CheckFailed, Outcome
from benchmarks.gpu.scene import Case, Scene
from flowception.data.loader import StepBatch
from flowception.data.step_plan import PackPlan
from flowception.nn.build import count_parameters
from flowception.training.estimate.arrangements import USABLE_SHARE, Job
from flowception.training.hardware import GIB, gpu_peak, peak_memory_gib

STEPS, PACKS = 4, 2
OPTIMIZER_PACKS = 8
"""Packs per step that amortize the optimizer in the second MFU: the recipe's number on 8 GPUs."""
LARGEST_DIFFERENCE = 2e-2
"""Relative, of a step's velocity loss."""
_ARM_LIMIT_S = 110.0
_CPU_ARM_LIMIT_S = 900.0
_TRIES, _MORE_BLOCKS = 3, 8
"""If the estimated minimum of checkpointed blocks runs out of memory: number of tries, and blocks added in each."""


@dataclass(frozen=True)
class Arm:
    """One way to run the recipe's blocks."""

    name: str
    compile: str
    checkpointed: bool
    """Whether all blocks are checkpointed; otherwise the fewest that fit."""


ARMS = (
    Arm("compile off, all blocks checkpointed", "off", True),
    Arm("blocks compiled, fewest checkpointed", "blocks", False),
    Arm("leaves compiled, all blocks checkpointed", "leaves", True),
    Arm("leaves compiled, fewest checkpointed", "leaves", False),
)
"""The recipe before and after all changes, then the intermediate variants."""


def peers_flops(case: Case, pack: PackPlan) -> float:
    """A pack's FLOPs as others count them; see the module docstring."""
    frames, text = case.pack_clips(pack)
    tokens = text + frames * (case.clip.height * case.clip.width + 1)
    spec = case.config.model.spec()
    layers, size = spec.num_layers, spec.hidden_size
    weights = layers * (4 * size * size + 3 * size * spec.mlp_hidden_size)
    return float(6.0 * weights * tokens.sum() + 12.0 * layers * size * (tokens**2).sum())


def fewest_checkpointed(case: Case, parameters: int, memory_bytes: float) -> int:
    """Fewest checkpointed blocks for which the dry run's estimate for one rank, without the EMA, fits a device.

    Args:
        case: The recipe.
        parameters: Parameters of its network.
        memory_bytes: Memory of the device.

    Returns:
        Their number; all blocks if no number fits.
    """
    job, zero = Job.of(case.config, parameters), case.config.zero
    ema = job.memory(zero, 1, 0).ema  # the estimate includes the EMA, so add the same amount to the usable memory
    blocks = job.fewest_checkpointed(zero, 1, memory_bytes + ema / USABLE_SHARE)
    return job.spec.num_layers if blocks is None else blocks


def estimated_gib(case: Case, parameters: int) -> float:
    """The dry run's memory estimate for a single rank, without the EMA, which is not built here."""
    config = case.config
    memory = Job.of(config, parameters).memory(config.zero, 1, config.model.checkpointed_blocks())
    return (memory.total - memory.ema) / GIB


def _device_bytes(scene: Scene) -> int:
    if scene.on_gpu:
        return int(torch.cuda.get_device_properties(scene.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run_arm(scene: Scene, arm: Arm, more_blocks: int, batches: list[StepBatch], found: Path) -> None:
    """Measure one arm in a separate process; writes its figures, or that it ran out of memory.

    Args:
        scene: The device.
        arm: The arm.
        more_blocks: Checkpointed blocks beyond the fewest.
        batches: The steps.
        found: File for the figures.
    """
    case = scene.recipe(f"model.compile={arm.compile}", "model.activation_checkpointing=true")
    parameters, layers = count_parameters(case.config.model), case.config.model.spec().num_layers
    if not arm.checkpointed:
        blocks = min(fewest_checkpointed(case, parameters, _device_bytes(scene)) + more_blocks, layers)
        case = scene.recipe(f"model.compile={arm.compile}", f"model.activation_checkpointing={blocks}")
    figures: dict[str, Any] = {
        "checkpointed_blocks": case.config.model.checkpointed_blocks(),
        "layers": layers,
        "estimated_gib": estimated_gib(case, parameters),
        "memory_gib": _device_bytes(scene) / GIB,
        "card": torch.cuda.get_device_name(scene.device) if scene.on_gpu else None,
    }
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


class _Runs(NamedTuple):
    """State shared by the processes of all arms."""

    scene: Scene
    batches: list[StepBatch]
    figures: dict[str, Any]
    """Of the check; each arm's are added."""


def four_ways(scene: Scene) -> Outcome:
    """Run every arm. Figures of earlier arms are kept if one fails."""
    plain = scene.recipe()
    batches = [plain.batch(step) for step in range(STEPS)]
    packs = [pack for batch in batches for pack in batch.step_plan.packs]
    figures: dict[str, Any] = {
        "parameters": count_parameters(plain.config.model),
        "pack_tflop": sum(map(plain.pack_flops, packs)) / len(packs) / 1e12,
        "pack_tflop_peers": sum(peers_flops(plain, pack) for pack in packs) / len(packs) / 1e12,
        "arms": {},
    }
    runs, found = _Runs(scene, batches, figures), scene.folder / "arms.json"
    limit_s = len(ARMS) * _TRIES * _arm_limit_s(scene)  # only a bound: the check's limit is reached first
    log = scene.folder / "arms.log"
    ending = run_in_child(partial(_import_and_run_arms, runs, found), limit_s, log, own_group=False)
    if ending.code != 0 or not found.is_file():
        raise CheckFailed(f"the arms could not run: {ending.reason(limit_s)}", figures)
    arms: dict[str, dict[str, Any]] = json.loads(found.read_text()) or _run_arms(runs)
    figures["arms"] = arms
    failed = [f"{name}: {arm['failed']}" for name, arm in arms.items() if "failed" in arm] + _unlike(arms)
    if failed:
        raise CheckFailed(f"{'; '.join(failed)}; {_said(figures)}", figures)
    return Outcome(MEASURED, _said(figures), figures)


def _arm_limit_s(scene: Scene) -> float:
    return _ARM_LIMIT_S if scene.on_gpu else _CPU_ARM_LIMIT_S


def _import_and_run_arms(runs: _Runs, found: Path) -> None:
    """Runs in a separate process: import the slow packages once, then fork every arm, if forking is still possible."""
    for name in ("deepspeed", "torch._dynamo"):
        importlib.import_module(name)
    found.write_text(json.dumps({} if _forks_badly(runs.scene) else _run_arms(runs)))


def _forks_badly(scene: Scene) -> bool:
    """Whether a child of this process cannot use CUDA because it is initialized here; only a child can tell."""

    def tell() -> None:
        if torch.cuda._is_in_bad_fork():
            raise RuntimeError("CUDA was started before the fork")

    return run_in_child(tell, _arm_limit_s(scene), scene.folder / "fork.log", own_group=False).code != 0


def _run_arms(runs: _Runs) -> dict[str, dict[str, Any]]:
    """Figures by arm name."""
    scene, figures = runs.scene, runs.figures
    for number, arm in enumerate(ARMS):
        arm_figures = _first_that_fits(runs, arm, scene.folder / f"arm_{number}")
        _add_shares(figures, arm_figures)
        figures["arms"][arm.name] = arm_figures
        scene.note(Outcome(MEASURED, _said(figures), figures))
    arms: dict[str, dict[str, Any]] = figures["arms"]
    return arms


def _unlike(arms: dict[str, dict[str, Any]]) -> list[str]:
    """Arms whose losses differ from the first arm's beyond bfloat16 rounding: all arms train on the same data."""
    losses = {name: found["losses"] for name, found in arms.items() if "losses" in found}
    first: list[float] = next(iter(losses.values()), [])
    return [
        f"{name}: losses must equal {first}, got {found}"
        for name, found in losses.items()
        if not all(abs(ours - theirs) <= LARGEST_DIFFERENCE * abs(theirs) for ours, theirs in zip(found, first))
    ]


def _first_that_fits(runs: _Runs, arm: Arm, place: Path) -> dict[str, Any]:
    """The arm's figures. If an arm without full checkpointing runs out of memory, more blocks are checkpointed."""
    tries: list[dict[str, Any]] = []
    limit_s = _arm_limit_s(runs.scene)
    for number in range(1 if arm.checkpointed else _TRIES):
        found, log = place.with_suffix(f".{number}.json"), place.with_suffix(f".{number}.log")
        train = partial(run_arm, runs.scene, arm, number * _MORE_BLOCKS, runs.batches, found)
        ending = run_in_child(train, limit_s, log, own_group=False)
        if ending.code != 0 or not found.is_file():
            return {"failed": ending.reason(limit_s), "tries": tries}
        figures: dict[str, Any] = json.loads(found.read_text())
        if "out_of_memory" not in figures:
            return figures | ({"tries": tries} if tries else {})
        tries.append(figures)
    return {**tries[-1], "tries": tries[:-1]}


def _add_shares(figures: dict[str, Any], arm: dict[str, Any]) -> None:
    """Add the MFU of an arm, if the card's peak is known."""
    peak = gpu_peak(arm["card"]) if arm.get("card") else None
    if peak is None or "ms_per_pack" not in arm:
        return
    pack_s = arm["ms_per_pack"] / 1e3
    whole_s = pack_s + arm["optimizer_ms"] / 1e3 / OPTIMIZER_PACKS
    arm["peak_tflops"] = peak.tflops
    arm["mfu"] = figures["pack_tflop"] / pack_s / peak.tflops
    arm["mfu_with_optimizer"] = figures["pack_tflop"] / whole_s / peak.tflops
    arm["mfu_peers"] = figures["pack_tflop_peers"] / pack_s / peak.tflops


def _said(figures: dict[str, Any]) -> str:
    words = [f"{figures['parameters'] / 1e9:.3g} B, {figures['pack_tflop']:.4g} TFLOP a pack"]
    for name, arm in figures["arms"].items():
        blocks = f" ({arm['checkpointed_blocks']} of {arm['layers']} checkpointed)" if "layers" in arm else ""
        if "ms_per_pack" not in arm:
            words.append(f"{name}{blocks}: {'out of memory' if 'out_of_memory' in arm else 'failed'}")
            continue
        mfu = f", MFU {arm['mfu']:.1%}" if "mfu" in arm else ""
        full = f", out of memory with {', '.join(str(each['checkpointed_blocks']) for each in arm.get('tries', []))}"
        words.append(
            f"{name}{blocks}: {arm['ms_per_pack']:.0f} ms a pack{mfu}, {arm['peak_gib']:.1f} GiB "
            f"(estimate {arm['estimated_gib']:.1f}){full if arm.get('tries') else ''}"
        )
    return "; ".join(words)
