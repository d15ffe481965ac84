"""Small shard sets on disk, and plan configurations for them, shared by the tests of ``shards`` and ``data``."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from flowception.data.step_plan import PlanConfig
from flowception.flow.extended_time import ProcessConfig
from flowception.packing.flops import ModelSpec
from flowception.shards.schema import ClipRecord, NullText, ShardMeta
from flowception.shards.writer import ShardSetWriter

CHANNELS, TEXT_WIDTH, NULL_TEXT_TOKENS = 4, 6, 2


def configs(**keys) -> tuple[ProcessConfig, PlanConfig]:
    """Process and plan sizes from the keys of both, with small defaults."""
    keys = {"token_budget": 200, "packs_per_step": 8, "shuffle_block_shards": 2} | keys
    sizes = {field.name for field in fields(PlanConfig)}
    process = ProcessConfig(**{name: value for name, value in keys.items() if name not in sizes})
    return process, PlanConfig(**{name: value for name, value in keys.items() if name in sizes})


def record(number: int, *, frames: int, height: int = 2, width: int = 3, text: int = 0) -> ClipRecord:
    generator = torch.Generator().manual_seed(number)
    return ClipRecord(
        key=f"clip_{number:03d}",
        latents=torch.randn(frames, CHANNELS, height, width, generator=generator).bfloat16(),
        text=torch.randn(text, TEXT_WIDTH, generator=generator).bfloat16() if text else None,
        source=f"video {number}.mp4",
        caption='a "red" disc\nmoves',
        fps=8.0,
        pixel_height=8,
        pixel_width=12,
        pixel_frames=frames,
        class_label=number % 3 if number % 5 else None,
    )


def lengths(count: int) -> list[int]:
    return np.random.default_rng(5).integers(1, 9, count).tolist()


@pytest.fixture(scope="session")
def make_config():
    return configs


@pytest.fixture(scope="session")
def make_spec():
    def make(**keys) -> ModelSpec:
        sizes = {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "in_channels": CHANNELS,
            "mlp_hidden_size": 88,
            "num_classes": 3,
        }
        return ModelSpec(**(sizes | keys))

    return make


def write_small_set(folder: Path, count: int = 30, per_shard: int = 10, *, text: bool = False) -> list[ClipRecord]:
    """Write a set of ``count`` clips in shards of ``per_shard``; returns its records."""
    records = [record(i, frames=n, height=2 + i % 2, text=(i % 4) if text else 0) for i, n in enumerate(lengths(count))]
    meta = ShardMeta(
        codec="patchify",
        codec_fingerprint="abc",
        latent_channels=CHANNELS,
        text_width=TEXT_WIDTH if text else None,
        null_text=NullText.of(torch.full((NULL_TEXT_TOKENS, TEXT_WIDTH), 0.25)) if text else None,
        class_names=["red", "green", "blue"],
    )
    writer = ShardSetWriter(folder, meta)
    for shard in range(-(-count // per_shard)):
        writer.write_shard(shard, records[shard * per_shard : (shard + 1) * per_shard])
    writer.finish()
    return records


@pytest.fixture
def make_set(tmp_path):
    """``write_small_set`` in a new folder of the test; returns (folder, records)."""

    def make(count: int = 30, per_shard: int = 10, *, text: bool = False, name: str = "set"):
        return tmp_path / name, write_small_set(tmp_path / name, count, per_shard, text=text)

    return make
