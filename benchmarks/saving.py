"""Measure how long a checkpoint blocks training, compared with how long the save takes.

``python benchmarks/saving.py --json FILE`` builds the model of a preset with optimizer and EMA on one rank, saves it
several times in the background through ``training.checkpointer`` while the main thread is idle, and prints medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from flowception.checkpoint.reader import verify
from flowception.nn.build import build_backbone
from flowception.nn.init import initialize
from flowception.nn.presets import DiTConfig
from flowception.training.checkpointer import Saver
from flowception.training.distributed.launch import init_distributed
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.distributed.zero import ZeroConfig, build_engine, deepspeed_config
from flowception.training.optim import OptimConfig, build_optimizer
from flowception.training.resume import CheckpointConfig


def measure(preset: str, stage: int, saves: int, folder: str | None) -> dict[str, object]:
    """Save ``saves`` times, after a first save that is reported separately.

    Args:
        preset: Preset of the network.
        stage: ZeRO stage.
        saves: Number of saves.
        folder: Where to save; None is the system's temporary folder.

    Returns:
        Sizes and seconds by name.
    """
    ranks = init_distributed()
    config = DiTConfig(preset=preset)
    engine = build_engine(
        lambda: build_backbone(config),
        lambda model: build_optimizer(model, OptimConfig(), ranks.device),
        deepspeed_config(ZeroConfig(stage=stage), "fp32", 1, None, ranks.device),
        ranks.device,
    )
    shards = ShardedState(engine)
    with torch.device("meta"):
        blueprint = build_backbone(config)
    shards.initialize(blueprint, lambda model, gather: initialize(model, 0, gather))
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    blocked_s, total_s = [], []
    try:
        saver = Saver(run_dir, CheckpointConfig(), shards)
        for step in range(saves + 1):
            saved = saver.save(step, {})
            metrics = saver.poll()
            blocked_s.append(metrics["save_blocked_s"])
            total_s.append(metrics["save_s"])
        saver.close()
        size_bytes = sum(record.size_bytes for record in verify(saved).files.values())
    finally:
        shutil.rmtree(run_dir)
    result = {
        "preset": preset,
        "parameters": sum(torch.Size(shape).numel() for shape in shards.parameter_shapes.values()),
        "zero_stage": stage,
        "device": str(ranks.device),
        "cpu_cores": os.cpu_count(),
        "checkpoint_bytes": size_bytes,
        "first_save_blocked_s": blocked_s[0],
        "save_blocked_s": statistics.median(blocked_s[1:]),
        "save_s": statistics.median(total_s[1:]),
    }
    torch.distributed.destroy_process_group()
    return result


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="s")
    parser.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3))
    parser.add_argument("--saves", type=int, default=7, metavar="N")
    parser.add_argument("--folder", metavar="DIR", help="where to save (default: temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    result = measure(arguments.preset, arguments.stage, arguments.saves, arguments.folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['parameters']:,} parameters, {result['checkpoint_bytes']:,} bytes: training blocked for "
        f"{result['save_blocked_s']:.3f} s of {result['save_s']:.3f} s"
    )


if __name__ == "__main__":
    main()
