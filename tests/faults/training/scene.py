"""The runs that faults are injected into: a toy set, a configuration that runs in seconds, and a reference run.

The uninterrupted run is made twice for each number of ranks and ZeRO stage: once without hooks, and once with hooks
that count and record but inject nothing. Both results must be bit-identical, so the hooks change nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from flowception.checkpoint.format import checkpoint_dir
from flowception.checkpoint.reader import hashes
from flowception.shards.schema import ClipRecord, ShardMeta
from flowception.shards.writer import ShardSetWriter
from tests.faults.training.hooks import Hooks, Injection
from tests.faults.training.jobs import Job, JobServer
from tests.faults.training.sabotage import SABOTAGES

STEPS, SAVE_EVERY, SNAPSHOT_STEP, FAULTY_SAVE = 8, 2, 4, 6
CLIPS, CHANNELS, GRID = 40, 4, 2
PACKS_PER_STEP = 4

Place = tuple[int, int, int]
"""Epoch, step and number of a pack."""


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run."""

    hashes: dict[str, str]
    losses: list[float]
    consumed: dict[Place, tuple[tuple[str, ...], str]]
    """Keys and digest of every pack."""
    events: dict[str, list[int]]
    """Events of each place, by rank."""
    operations: list[list[str]]
    """The file operations of the save of ``FAULTY_SAVE``, by rank."""
    file_operations: list[list[str]]
    """The file operations on other files of the run, by rank."""


def write_set(folder: Path) -> None:
    """Smooth drifting latents of 4 to 9 frames, 2 x 2 cells, 2 classes; not from a real codec."""
    meta = ShardMeta(
        codec="patchify",
        codec_fingerprint="f" * 64,
        latent_channels=CHANNELS,
        class_names=["a", "b"],
        codec_config={"name": "patchify", "patch_size": 4},
    )
    writer, generator = ShardSetWriter(folder, meta), torch.Generator().manual_seed(0)
    records = []
    for number in range(CLIPS):
        frames, label = 4 + number % 6, number % 2
        phase = 2 * math.pi * torch.rand(CHANNELS, GRID, GRID, generator=generator)
        time = torch.arange(frames).view(-1, 1, 1, 1)
        latents = torch.sin(phase + 0.3 * (1 + label) * time)
        records.append(ClipRecord(key=f"clip-{number:05d}", latents=latents, class_label=label, fps=8.0))
    writer.write_shard(0, records)
    writer.finish()


def write_config(path: Path, data: Path) -> None:
    """A network of about 20,000 parameters that uses all training state: EMA, warm-up, held-out loss."""
    config = {
        "run_dir": "given on the command line",
        "max_steps": STEPS,
        "precision": "fp32",
        "token_budget": 96,
        "packs_per_step": PACKS_PER_STEP,
        "num_start_frames": 2,
        "tasks": {"t2v": 0.5, "i2v": 0.5},
        "data": {"path": str(data), "heldout_fraction": 0.15},
        "model": {"preset": None, "in_channels": CHANNELS, "hidden_size": 32, "num_layers": 1, "num_heads": 2},
        "optim": {"lr": 2e-3, "warmup_steps": 4},
        "ema": {"decay": 0.9},
        "zero": {"stage": 3, "param_persistence_threshold": 0},
        "checkpoint": {"save_every_steps": SAVE_EVERY, "keep_last": 2, "save_timeout_s": 15.0},
        "validation": {"every_steps": 4, "num_clips": 3, "global_times": [0.7]},
        "logging": {"every_steps": 1},
    }
    config["model"] |= {"num_classes": 2}  # type: ignore[operator]
    path.write_text(yaml.safe_dump(config))


def read_losses(run_dir: Path) -> list[float]:
    """Losses of ``metrics.jsonl``, which must have every step exactly once, in order.

    Raises:
        ValueError: If it does not.
    """
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if (steps := [row["step"] for row in rows]) != list(range(1, len(rows) + 1)):
        raise ValueError(f"metrics.jsonl has the steps {steps}")
    return [row["loss"] for row in rows]


def steps_noted(run_dir: Path) -> int:
    """Number of complete lines of ``metrics.jsonl``; a kill may have truncated the last one."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def read_consumed(notes: Path) -> list[tuple[Place, tuple[tuple[str, ...], str]]]:
    """Packs trained on, in the recorded order, including repeated steps."""
    path = notes / "consumed.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [((epoch, step, pack), (tuple(keys), digest)) for (epoch, step, pack), keys, digest in found]


class Scene:
    """A server, a data set, a configuration, and uninterrupted runs that are made on demand."""

    def __init__(self, folder: Path, sabotage: str | None = None) -> None:
        """Create the data and preload the server; about 15 s.

        Args:
            folder: An empty folder for everything.
            sabotage: Name of a wrong resume on purpose (``SABOTAGES``); it applies to every job except the references.
        """
        self.folder, self.server = folder, JobServer()
        self._sabotage = SABOTAGES[sabotage] if sabotage else None
        self._references: dict[tuple[int, int], Reference] = {}
        self._snapshots: dict[tuple[int, int], Path] = {}
        self.server.apart(partial(write_set, folder / "shards"))
        write_config(folder / "config.yaml", folder / "shards")
        self.server.preload(self.command(folder / "preload", 3), folder)

    def command(self, run_dir: Path, stage: int) -> list[str]:
        """Arguments of ``train/main.py``."""
        return ["--config", str(self.folder / "config.yaml"), f"run_dir={run_dir}", f"zero.stage={stage}"]

    def run(
        self,
        place: Path,
        world_size: int,
        stage: int,
        injections: tuple[Injection, ...] = (),
        grace_s: float = 2.0,
    ) -> Job:
        """Run the command on ``place / run`` until it ends; records and the log are beside it."""
        prepare = partial(self.prepare, place=place, injections=injections)
        command = self.command(place / "run", stage)
        return self.server.run(command, world_size, place / "log", prepare, grace_s)

    def prepare(self, rank: int, *, place: Path, injections: tuple[Injection, ...], record: bool = False) -> None:
        """Set up a forked rank before ``main``."""
        hooks = Hooks(rank, place / "run", place, injections, record)
        if self._sabotage is not None and not record:
            self._sabotage()
        hooks.install()

    def reference(self, world_size: int, stage: int) -> Reference:
        """The uninterrupted run, made on first use.

        Raises:
            RuntimeError: If it fails, or the hooks change it.
        """
        key = (world_size, stage)
        if key not in self._references:
            self._references[key] = self._make_reference(world_size, stage)
        return self._references[key]

    def _make_reference(self, world_size: int, stage: int) -> Reference:
        bare, dry = (self.folder / f"{name}-{world_size}-{stage}" for name in ("bare", "dry"))
        for place in (bare, dry):
            place.mkdir()
        prepare = partial(self.prepare, place=dry, injections=(), record=True)
        jobs = [
            self.server.run(self.command(bare / "run", stage), world_size, bare / "log"),
            self.server.run(self.command(dry / "run", stage), world_size, dry / "log", prepare),
        ]
        for job in jobs:
            if any(job.codes.values()):
                raise RuntimeError(f"the uninterrupted run failed:\n{job.log.read_text()[-4000:]}")
        found = [hashes(checkpoint_dir(place / "run", STEPS)) for place in (bare, dry)]
        if found[0] != found[1] or read_losses(bare / "run") != read_losses(dry / "run"):
            raise RuntimeError("the uninterrupted run differs with the hooks, or it is not deterministic")
        events = [_read_events(dry, rank) for rank in range(world_size)]
        counts = [Counter(place for place, _ in own) for own in events]
        return Reference(
            found[0],
            read_losses(bare / "run"),
            dict(read_consumed(dry)),
            {place: [count[place] for count in counts] for place in {place for count in counts for place in count}},
            [_operations(own, f"save:{FAULTY_SAVE}") for own in events],
            [_operations(own, "files") for own in events],
        )

    def snapshot(self, world_size: int, stage: int, into: Path) -> None:
        """Copy a run that was stopped after ``SNAPSHOT_STEP``, with its records, to ``into``."""
        key = (world_size, stage)
        if key not in self._snapshots:
            place = self.folder / f"snapshot-{world_size}-{stage}"
            place.mkdir()
            job = self.run(place, world_size, stage, (Injection("batch", SNAPSHOT_STEP, 0, "signal"),))
            if set(job.codes.values()) != {85}:
                raise RuntimeError(f"the run did not stop at step {SNAPSHOT_STEP}:\n{job.log.read_text()[-4000:]}")
            (place / "fired-0").unlink()
            self._snapshots[key] = place
        shutil.copytree(self._snapshots[key], into, dirs_exist_ok=True)


def _read_events(place: Path, rank: int) -> list[tuple[str, str]]:
    lines: list[list[Any]] = [json.loads(line) for line in (place / f"events-{rank}.jsonl").read_text().splitlines()]
    return [(name, operation) for name, operation in lines]


def _operations(events: list[tuple[str, str]], place: str) -> list[str]:
    return [operation for found, operation in events if found == place]
