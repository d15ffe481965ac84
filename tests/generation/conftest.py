"""A tiny network in which every part has an effect, sampler states for it, and run directories with it."""

import dataclasses
import json

import pytest
import torch

from flowception.checkpoint import writer
from flowception.checkpoint.format import KINDS
from flowception.codecs import CodecConfig, build_codec
from flowception.codecs.text import TextEncoder, TextEncoderConfig
from flowception.flow import Context, SamplerConfig, SamplerState
from flowception.flow.sampler_state import initial_state
from flowception.nn import DiTConfig, FlowceptionDiT
from flowception.shards.schema import NullText, ShardMeta

CHANNELS, HEIGHT, WIDTH = 12, 3, 2
FRAME_SHAPE = (CHANNELS, HEIGHT, WIDTH)


def tiny_config(**changes):
    sizes = {"preset": None, "in_channels": CHANNELS, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    return DiTConfig(**{**sizes, "num_classes": 3, **changes})


def tiny_model(**changes):
    """Random values everywhere, so that zero-initialized gates hide nothing, with rates close to zero."""
    model = FlowceptionDiT(tiny_config(**changes)).initialize(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_model():
    return tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture
def make_state():
    """A state of clips with the given numbers of context and start frames, ``step`` steps into sampling."""

    def make(starts, contexts=(), *, step=0, seed=0, num_inference_steps=10, time_shift=1.0) -> SamplerState:
        generator = torch.Generator().manual_seed(100 + seed)
        given = [
            Context(frames=torch.randn(k, *FRAME_SHAPE, generator=generator), num_start_frames=n) if k else None
            for k, n in zip(contexts or [0] * len(starts), starts, strict=True)
        ]
        config = SamplerConfig(
            num_inference_steps=num_inference_steps, num_start_frames=starts[0], time_shift=time_shift
        )
        state = initial_state(FRAME_SHAPE, len(starts), config, given, seed)
        return dataclasses.replace(state, step=step)

    return make


def write_run(
    folder, *, steps=(0, 4), class_names=("red", "green", "blue"), model_changes=(), meta_changes=(), **config_changes
):
    """Write a run directory as training does: config, manifest with the description of the shard set, checkpoints.

    EMA weights of step s are those of ``tiny_model`` plus s / 1000; the live weights are all zero.
    """
    codec = build_codec(CodecConfig(name="patchify", patch_size=2))
    meta = ShardMeta(
        codec="patchify", codec_fingerprint=codec.fingerprint(), latent_channels=CHANNELS,
        class_names=list(class_names), codec_config={"patch_size": 2},
        tokens_per_frame=[{"height": HEIGHT, "width": WIDTH, "tokens": HEIGHT * WIDTH + 1, "clips": 9}],
    )  # fmt: skip
    meta = dataclasses.replace(meta, **dict(meta_changes))
    folder.mkdir(parents=True)
    sizes = {"preset": None, "in_channels": CHANNELS, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    config = {
        "run_dir": str(folder), "max_steps": 4, "token_budget": 400, "packs_per_step": 1, "num_start_frames": 2,
        "data": {"path": str(folder / "no-shards-here")},
        "model": {**sizes, "num_classes": len(class_names), **dict(model_changes)},
        **config_changes,
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "manifest.json").write_text(json.dumps({"model": {}, "shards": dataclasses.asdict(meta)}))
    model = tiny_model(num_classes=len(class_names), **dict(model_changes))
    for step in steps:
        write_checkpoint(folder, step, {name: p.detach() + step / 1000 for name, p in model.named_parameters()})
    return folder


def text_changes(encoder_folder):
    """Changes for ``write_run``: a shard set with a T5 encoder and the embedding of the empty caption."""
    config = TextEncoderConfig(model=str(encoder_folder), dtype="float32")
    encoder = TextEncoder.from_config(config)
    null_text = NullText.of(encoder.encode([""])[0])
    meta = {"text_width": encoder.text_dim, "null_text": null_text, "text_config": dataclasses.asdict(config)}
    return {"model_changes": {"text_dim": encoder.text_dim}, "meta_changes": meta}


def write_checkpoint(run_dir, step, ema):
    tensors, ranges = {}, {}
    for name, value in ema.items():
        flat = value.flatten().float()
        ranges[name] = (tuple(value.shape), 0, flat.numel())
        tensors |= {f"{kind}/{name}": flat.clone() if kind == "ema" else torch.zeros_like(flat) for kind in KINDS}
    attempt = writer.make(writer.attempt_dir(run_dir, step, "test"))
    writer.write_slices(attempt, 0, tensors, ranges)
    writer.commit(attempt, step, writer.wait_for_receipts(attempt, 1, lambda: 0), {"optimizer_steps": step})


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """Write run directories; the one without changes is written only once."""
    made = {}

    def make(**changes):
        key = repr(changes)
        if key not in made:
            made[key] = write_run(tmp_path_factory.mktemp("runs") / "run", **changes)
        return made[key]

    return make
