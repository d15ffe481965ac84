"""A tiny shard set and the configuration of a run on it, for tests that run ``train/main.py``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import yaml

from flowception.shards.schema import ClipRecord, ShardMeta
from flowception.shards.writer import ShardSetWriter

CHANNELS, GRID = 4, 2


def write_set(
    folder: Path, clips: int = 48, codec_fingerprint: str = "f" * 64, seed: int = 0, channels: int = CHANNELS
) -> Path:
    """Smooth drifting latents of 4 to 9 frames, 2 x 2 cells, 2 classes; of no real codec unless its figures are given.

    12 channels and the fingerprint of patches of 2 make a set that can be decoded.
    """
    meta = ShardMeta(
        codec="patchify",
        codec_fingerprint=codec_fingerprint,
        latent_channels=channels,
        class_names=["a", "b"],
        codec_config={"name": "patchify", "patch_size": 4 if channels == CHANNELS else 2},
    )
    writer = ShardSetWriter(folder, meta)
    generator = torch.Generator().manual_seed(seed)
    for shard in range(2):
        writer.write_shard(shard, (record(shard * clips + i, generator, channels) for i in range(clips // 2)))
    writer.finish()
    return folder


def record(number: int, generator: torch.Generator, channels: int = CHANNELS) -> ClipRecord:
    frames, label = 4 + number % 6, number % 2
    phase = 2 * math.pi * torch.rand(channels, GRID, GRID, generator=generator)
    time = torch.arange(frames).view(-1, 1, 1, 1)
    latents = torch.sin(phase + 0.3 * (1 + label) * time)
    return ClipRecord(key=f"clip-{number:05d}", latents=latents, class_label=label, fps=8.0)


def read_metrics(run_dir: Path) -> list[dict]:
    """Lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write_config(path: Path, run_dir: Path, data: Path, **changes) -> Path:
    """A configuration of a network of about 25,000 parameters."""
    config = {
        "run_dir": str(run_dir),
        "max_steps": 12,
        "precision": "fp32",
        "token_budget": 96,
        "packs_per_step": 3,
        "num_start_frames": 2,
        "tasks": {"t2v": 0.5, "i2v": 0.5},
        "data": {"path": str(data), "heldout_fraction": 0.2},
        "model": {
            "preset": None,
            "in_channels": CHANNELS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_classes": 2,
        },
        "optim": {"lr": 2e-3, "warmup_steps": 4},
        "ema": {"decay": 0.9},
        "zero": {"stage": 3, "param_persistence_threshold": 0},
        "checkpoint": {"save_every_steps": 4},
        "validation": {"every_steps": 6, "num_clips": 6, "global_times": [0.5, 1.5]},
        "logging": {"every_steps": 1},
    }
    for key, value in changes.items():
        place = config
        *parents, last = key.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    path.write_text(yaml.safe_dump(config))
    return path


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_config(root / "config.yaml", root / "run", write_set(root / "shards"))
