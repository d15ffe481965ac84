"""Compares a run of ``train/main.py`` that is killed at a random step and resumed with an uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.outcome import PASS, CheckFailed, Outcome
from benchmarks.gpu.scene import ROOT, SMALL_CLIP, SMALL_WIDTH, Scene
from flowception.checkpoint.format import checkpoint_dir
from flowception.checkpoint.reader import hashes
from flowception.shards.schema import ClipRecord, ShardMeta
from flowception.shards.writer import ShardSetWriter

STEPS, SAVE_EVERY_STEPS = 30, 5
_CHANNELS, _CLIPS = 8, 64
_KILLED_BETWEEN = (3, 20)
_PATIENCE_S = 600.0
MAIN = ROOT / "benchmarks" / "gpu" / "deterministic_main.py"


def write_set(folder: Path) -> Path:
    """A shard set of random clips."""
    meta = ShardMeta(
        codec="patchify",
        codec_fingerprint="f" * 64,
        latent_channels=_CHANNELS,
        class_names=[],
        codec_config={"name": "patchify", "patch_size": 4},
    )
    writer = ShardSetWriter(folder, meta)
    generator = torch.Generator().manual_seed(0)
    shape = (SMALL_CLIP.frames, _CHANNELS, SMALL_CLIP.height, SMALL_CLIP.width)
    clips = [
        ClipRecord(key=f"clip-{number:05d}", latents=torch.randn(shape, generator=generator), fps=8.0)
        for number in range(_CLIPS)
    ]
    writer.write_shard(0, iter(clips))
    writer.finish()
    return folder


def command(scene: Scene, shards: Path, run_dir: Path) -> list[str]:
    """The training command: the recipe with a small network and without text."""
    words = [
        "model.preset=null",
        f"model.in_channels={_CHANNELS}",
        f"model.hidden_size={SMALL_WIDTH[scene.device.type]}",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.text_dim=0",
        "model.compile=off",
        "token_budget=64",
        "packs_per_step=2",
        "zero.param_persistence_threshold=0",
        "condition_dropout=0",
        "data.num_workers=0",
        "data.heldout_fraction=0",
        "validation.every_steps=null",
        "samples.every_steps=null",
        "optim.warmup_steps=4",
        f"checkpoint.save_every_steps={SAVE_EVERY_STEPS}",
        f"max_steps={STEPS}",
        f"data.path={shards}",
        f"run_dir={run_dir}",
    ]
    return [sys.executable, str(MAIN), "--config", str(ROOT / "configs" / "t2v_2b.yaml"), *words]


def environment() -> dict[str, str]:
    """Environment variables of a single-process run with deterministic cuBLAS."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def train(words: list[str], log: Path, kill_at: int | None = None) -> int:
    """Run the command, and SIGKILL it when its metrics reach a number of steps.

    Returns:
        Its exit code, or minus the signal number.
    """
    metrics = Path(next(word for word in words if word.startswith("run_dir="))[len("run_dir=") :], "metrics.jsonl")
    with log.open("ab") as stream:
        process = subprocess.Popen(words, env=environment(), stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
    deadline = time.monotonic() + _PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        if kill_at is not None and metrics.is_file() and metrics.read_bytes().count(b"\n") >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    else:
        process.kill() if process.poll() is None else None
    return process.wait()


def killed_and_resumed(scene: Scene) -> Outcome:
    """Three starts, and a fourth if the hashes differ, to distinguish a wrong resume from nondeterministic kernels."""
    shards, log = write_set(scene.folder / "shards"), scene.folder / "train.log"
    runs = {name: scene.folder / name for name in ("whole", "killed", "again")}
    words = {name: command(scene, shards, run_dir) for name, run_dir in runs.items()}
    kill_at = random.SystemRandom().randint(*_KILLED_BETWEEN)
    _expect(train(words["whole"], log), 0, "the uninterrupted run", log)
    _expect(train(words["killed"], log, kill_at), -signal.SIGKILL, f"the run to be killed after step {kill_at}", log)
    _expect(train(words["killed"], log), 0, "the resumed run", log)
    whole, resumed = (hashes(checkpoint_dir(runs[name], STEPS)) for name in ("whole", "killed"))
    figures: dict[str, Any] = {"killed_at": kill_at, "whole": whole, "resumed": resumed}
    way = "deterministic algorithms and CUBLAS_WORKSPACE_CONFIG" if scene.on_gpu else "deterministic algorithms"
    said = f"killed after step {kill_at} of {STEPS}, {len(whole)} hashes, with {way}"
    if resumed == whole:
        return Outcome(PASS, f"{said}: equal", figures)
    differing = [name for name, value in whole.items() if resumed[name] != value]
    _expect(train(words["again"], log), 0, "the second uninterrupted run", log)
    alike = hashes(checkpoint_dir(runs["again"], STEPS)) == whole
    why = "uninterrupted runs are equal, so the resume is wrong" if alike else "two uninterrupted runs differ too"
    raise CheckFailed(f"{said}: {', '.join(differing)} differ; {why}", figures)


def _expect(code: int, wanted: int, which: str, log: Path) -> None:
    if code != wanted:
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise CheckFailed(f"{which} must exit with {wanted}, got {code}; last output: {' '.join(words)}")
