"""Load what generation needs from a run directory: configuration, network with EMA weights, codec, sizes, classes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from flowception import run_directory
from flowception.checkpoint.format import checkpoint_dir, list_steps
from flowception.checkpoint.reader import latest_valid, read_full, verify
from flowception.codecs import Codec, CodecConfig, build_codec
from flowception.config import load
from flowception.errors import CheckpointError, DataError, FlowceptionError
from flowception.nn.build import build_backbone
from flowception.nn.presets import DiTConfig
from flowception.run_directory import RunConfig
from flowception.shards.open import DataConfig, open_set
from flowception.shards.schema import ShardMeta


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A loaded run, ready for sampling."""

    run_dir: Path
    step: int
    """Optimizer step of the weights."""
    config: RunConfig
    model: nn.Module
    """The network in evaluation mode with EMA weights, on the requested device."""
    codec: Codec
    meta: ShardMeta
    """Description of the shard set that the run was trained on."""
    null_text: torch.Tensor | None
    """bfloat16 [L, D]: text embedding of a clip without a prompt; None for a model without text."""

    @property
    def sizes_pixels(self) -> list[tuple[int, int]]:
        """Height and width in pixels of the training clips, most frequent first."""
        grids = sorted(self.meta.tokens_per_frame, key=lambda grid: -grid.get("clips", 0))
        stride = self.codec.spatial_stride
        return [(grid["height"] * stride, grid["width"] * stride) for grid in grids]

    @cached_property
    def fps(self) -> float | None:
        """Frames per second of the training clips; None if the shards are unreachable or do not record it."""
        return data_fps(self.config.data)


def find_checkpoint(run_dir: Path, step: int | None) -> Path:
    """Find the checkpoint to use and verify its EMA weights; nothing else of it is read.

    Args:
        run_dir: The run directory.
        step: Step of the checkpoint; None for the newest valid one.

    Raises:
        CheckpointError: If there is none, or the requested one is missing or damaged.
    """
    if step is None:
        newest = latest_valid(run_dir, check=_verify_weights)
        if newest is None:
            raise CheckpointError(
                f"{run_dir} has no checkpoint yet; wait for the first one or set checkpoint.save_at_start"
            )
        return newest
    folder = checkpoint_dir(run_dir, step)
    if not folder.is_dir():
        steps = ", ".join(map(str, list_steps(run_dir))) or "none"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; available: {steps}")
    _verify_weights(folder)
    return folder


def _verify_weights(folder: Path) -> None:
    verify(folder, kinds=("ema",))


def codec_of(meta: ShardMeta, device: torch.device | str = "cpu") -> Codec:
    """Build the codec that made a shard set, and check its fingerprint."""
    known = {field.name for field in fields(CodecConfig)}
    settings = {name: value for name, value in meta.codec_config.items() if name in known}
    codec = build_codec(CodecConfig(**{**settings, "name": meta.codec}), device)
    if codec.fingerprint() != meta.codec_fingerprint:
        raise DataError(
            f"the codec {meta.codec} must have fingerprint {meta.codec_fingerprint[:12]}, as in the shards, got "
            f"{codec.fingerprint()[:12]}: its weights or settings differ; use the codec that made the shards"
        )
    return codec


def load_run(run_dir: Path, *, step: int | None = None, device: torch.device | str = "cpu") -> LoadedRun:
    """Load a run: the network with EMA weights on ``device``, and the codec that decodes its latents.

    Args:
        run_dir: The run directory.
        step: Step of the checkpoint; None for the newest valid one.
        device: Device of network and codec.

    Returns:
        The loaded run.

    Raises:
        FlowceptionError: If anything is missing, damaged, or from another model.
    """
    shards = run_directory.read_begun(run_dir)["shards"]
    config = load(RunConfig, [run_dir / "config.yaml"], others_allowed=True)
    meta = ShardMeta.from_json(json.dumps(shards), str(run_dir / "manifest.json"))
    if config.model.in_channels is None:
        config.model = replace(config.model, in_channels=meta.latent_channels)
    folder = find_checkpoint(run_dir, step)
    return LoadedRun(
        run_dir=run_dir,
        step=int(folder.name.removeprefix("step_")),
        config=config,
        model=load_network(folder, config.model, device),
        codec=codec_of(meta, device),
        meta=meta,
        null_text=_null_text(meta, config, run_dir),
    )


def _null_text(meta: ShardMeta, config: RunConfig, run_dir: Path) -> torch.Tensor | None:
    if config.model.spec().text_dim is None:
        return None
    null_text = meta.null_embedding()
    if null_text is None:
        raise DataError(
            f"the model of {run_dir} takes text, but its manifest.json describes shards without; restore it"
        )
    return null_text


def load_network(folder: Path, config: DiTConfig, device: torch.device | str = "cpu") -> nn.Module:
    """Load a checkpoint's network with its EMA weights; no other weights are ever allocated.

    Args:
        folder: The checkpoint, from ``find_checkpoint``.
        config: The run's network, with ``in_channels`` set.
        device: Device of the network.

    Returns:
        The network in evaluation mode.

    Raises:
        CheckpointError: If the checkpoint is of another network.
    """
    weights = read_full(folder, "ema")
    with torch.device("meta"):
        model = build_backbone(config)
    expected = dict(model.named_parameters())
    if expected.keys() != weights.keys() or any(expected[name].shape != weights[name].shape for name in expected):
        differing = sorted(expected.keys() ^ weights.keys()) or [
            n for n in expected if expected[n].shape != weights[n].shape
        ]
        raise CheckpointError(
            f"{folder} does not match the model in the run's config.yaml, first at {differing[0]}; restore config.yaml"
        )
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)


def data_fps(data: DataConfig) -> float | None:
    """Frames per second of the first training clip; None if the shards are unreachable or do not record it."""
    try:
        return float(open_set(data.sets[0].path, data.cache).read_metadata(0).get("fps") or 0) or None
    except (FlowceptionError, OSError, IndexError):
        return None
