"""Train on Gaussian clips with the real trainer, and compare the network with the exact oracle on held-out clips."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml

from flowception.checkpoint.format import checkpoint_dir
from flowception.checkpoint.reader import read_full
from flowception.data.loader import Cursor, PackLoader
from flowception.data.pack import Pack
from flowception.evaluation.oracles.gaussian import GaussianClips, GaussianOracle
from flowception.flow import Role
from flowception.flow.loss import rate_from_log
from flowception.nn.dit import FlowceptionDiT
from flowception.packing.layout import ModelRole
from flowception.shards.schema import ClipRecord, ShardMeta
from flowception.shards.writer import ShardSetWriter
from flowception.training.config import load_config
from flowception.training.data import heldout_plan, open_data
from flowception.training.distributed.launch import init_distributed
from flowception.training.signals import StopFlag
from flowception.training.trainer import train

LAW = GaussianClips(lengths={2: 0.5, 5: 0.5}, correlation=0.8, num_start_frames=1)
CONFIG = {
    "max_steps": 250,
    "precision": "fp32",
    "token_budget": 1536,
    "packs_per_step": 1,
    "num_start_frames": 1,
    "insertion_loss_weight": 0.5,
    "condition_dropout": 0.0,
    "data": {"heldout_fraction": 0.2},
    "model": {"preset": None, "hidden_size": 64, "num_layers": 3, "num_heads": 2},
    "optim": {"lr": 3e-3, "warmup_steps": 100, "lr_schedule": "cosine", "lr_end_ratio": 0.02, "weight_decay": 0.0},
    "ema": {"decay": 0.99},
    "zero": {"stage": 1},
    "checkpoint": {"save_every_steps": 100000, "save_at_start": False},
    "validation": {"every_steps": None},
    "logging": {"every_steps": 50},
}


def write_set(folder: Path, clips_of_each_length: int, seed: int = 0) -> None:
    """Clips of the process, one value per frame."""
    meta = ShardMeta(codec="none", codec_fingerprint="0" * 64, latent_channels=1, codec_config={"name": "none"})
    generator = torch.Generator().manual_seed(seed)
    writer = ShardSetWriter(folder, meta)
    for shard, length in enumerate(LAW.lengths):
        drawn = LAW.draw(length, clips_of_each_length, generator).float()[:, :, None, None, None]
        writer.write_shard(
            shard,
            (ClipRecord(key=f"clip-{length}-{i:05d}", latents=clip, fps=1.0) for i, clip in enumerate(drawn)),
        )
    writer.finish()


def excess(model: FlowceptionDiT, oracle: GaussianOracle, pack: Pack) -> torch.Tensor:
    """Sums over one pack: Bayes velocity error, excess over it, Bayes rate deviance, excess over it."""
    layout, used = pack.layout, pack.layout.frame_valid
    latent = layout.latent_mask
    context = {ModelRole.GENERATED: Role.START, ModelRole.ACTIVE: Role.CONTEXT_ACTIVE}
    roles = torch.tensor([int(context[ModelRole(role)]) for role in pack.role[used].tolist()])
    clip, times = layout.frame_clip[used], pack.time[used].double()
    clock = torch.zeros(len(pack.keys), dtype=torch.float64).scatter_reduce(0, clip, times, "amax")
    cu_frames = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(clip, minlength=len(clock)).cumsum(0)])
    best_velocity, best_rate = oracle.predict(pack.noisy[latent], times, roles, cu_frames, clock)
    with torch.no_grad():
        output = model(pack)
    in_flow, sites = pack.velocity_mask[latent], pack.insertion_mask[used]
    target = pack.velocity_target[latent][in_flow]
    own, best = output.velocity[latent][in_flow], best_velocity[in_flow]
    rate, best_rate = rate_from_log(output.log_rate[used][sites]).double(), best_rate[sites].clamp(min=1e-12)
    missing = pack.missing[used][sites].double()
    deviance = 2 * (torch.xlogy(missing, missing) - torch.xlogy(missing, best_rate) - missing + best_rate)
    # E[missing] is the oracle's rate: the mean excess without the noise of the counts themselves.
    deviance_excess = 2 * (rate - best_rate - torch.xlogy(best_rate, rate / best_rate))
    return torch.stack(
        [
            (target - best).square().sum().double(),
            (own - best).square().sum().double(),
            deviance.sum(),
            deviance_excess.sum(),
        ]
    )


def train_and_compare(folder: str, clips_of_each_length: int = 5000, **changes) -> dict[str, float]:
    """Write a set, train on it, and measure on held-out clips: excess velocity error and rate deviance over Bayes."""
    root = Path(folder)
    torch.set_num_threads(1)
    if not (root / "shards").exists():
        write_set(root / "shards", clips_of_each_length)
    values = CONFIG | {"run_dir": str(root / "run"), "data": CONFIG["data"] | {"path": str(root / "shards")}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = values[section] | {name: value} if name else value
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config([path])
    assert train(config, init_distributed(), StopFlag())
    config = load_config([root / "run" / "config.yaml"])
    model = FlowceptionDiT(config.model)
    model.load_state_dict(read_full(checkpoint_dir(root / "run", config.max_steps), "ema"))
    plan, reader = heldout_plan(config, data := open_data(config)), data.reader
    oracle = GaussianOracle(LAW, config.schedule())
    loader = PackLoader(plan, reader, cursor=Cursor(0, 0))
    sums = sum(excess(model.eval(), oracle, pack) for batch in loader for pack in batch.packs)
    velocity, velocity_excess, deviance, deviance_excess = sums.tolist()
    return {
        "velocity": velocity_excess / velocity,
        "rate": deviance_excess / deviance,
        "heldout_clips": len(plan.rows),
    }


if __name__ == "__main__":
    import json
    import time

    changes = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in sys.argv[2:])}
    began = time.time()
    print(json.dumps(train_and_compare(sys.argv[1], **changes)), round(time.time() - began), "s", changes)
