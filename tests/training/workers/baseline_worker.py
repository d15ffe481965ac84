"""Worker side of the baselines' test: a short run under every overlay of ``configs``, and clips from each."""

from __future__ import annotations

from pathlib import Path

import torch

from flowception.codecs.patchify import PatchifyCodec
from flowception.flow.delays import build_delay_law
from flowception.generation.generate import GenerateOptions, generate
from flowception.training.config import load_config
from flowception.training.distributed.launch import init_distributed
from flowception.training.signals import StopFlag
from flowception.training.trainer import train
from tests.training.workers.toy_set import read_metrics, write_config, write_set

CONFIGS = Path(__file__).parents[3] / "configs"
STEPS, NUM_FRAMES, NUM_INFERENCE_STEPS = 20, 6, 4


def train_and_generate(folder: str) -> dict[str, dict]:
    """Metrics and generated clips with each overlay, and without one, by overlay name."""
    torch.set_num_threads(1)
    ranks, codec = init_distributed(), PatchifyCodec(2)
    channels = codec.latent_channels
    data = write_set(Path(folder, "shards"), codec_fingerprint=codec.fingerprint(), channels=channels)
    base = write_config(Path(folder, "c.yaml"), Path(folder), data, max_steps=STEPS, model__in_channels=channels)
    results = {}
    for overlay in [None, *sorted(CONFIGS.glob("baseline_*.yaml"))]:
        name = "none" if overlay is None else overlay.stem
        run_dir = Path(folder, name)
        words = [f"run_dir={run_dir}", "checkpoint.save_every_steps=20", "validation.every_steps=20"]
        config = load_config([base] if overlay is None else [base, overlay], words)
        train(config, ranks, StopFlag())
        prescribed = not build_delay_law(config.process.delay_law).inserts
        options = GenerateOptions(
            run_dir=run_dir,
            out_dir=run_dir / "clips",
            num=2,
            num_inference_steps=NUM_INFERENCE_STEPS,
            max_frames=12,
            num_frames=NUM_FRAMES if prescribed else None,
            size=(4, 4),
            device="cpu",
        )
        metrics = read_metrics(run_dir)
        results[name] = {"law": config.process.delay_law, "metrics": metrics, "clips": generate(options)}
    return results
