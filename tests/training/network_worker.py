"""Worker side of the tests of the real network under ZeRO: what it computes with when DeepSpeed builds and holds it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowception.nn.backbone import build_backbone
from flowception.nn.initialise import initialise
from flowception.nn.layers import FeatureMLP
from flowception.nn.layout import ClipShape, PackInput, build_layout
from flowception.nn.presets import DiTConfig
from flowception.training.distributed import init_distributed
from flowception.training.optim import OptimConfig, build_optimizer
from flowception.training.shards import ShardedState
from flowception.training.zero import ZeroConfig, build_engine, deepspeed_config

MODEL = DiTConfig(preset=None, in_channels=4, hidden_size=64, num_layers=2, num_heads=2, text_dim=6, num_classes=3)


def make_pack(seed: int = 0) -> PackInput:
    """Two clips with text, far enough apart in rank and place that a rounded frequency shows."""
    generator = torch.Generator().manual_seed(seed)
    layout = build_layout([ClipShape(30, 4, 6, 9), ClipShape(5, 3, 2, 4)])
    tokens, frames = layout.shape.token_budget, layout.shape.max_frames
    return PackInput(
        layout=layout,
        noisy=torch.randn(tokens, 4, generator=generator),
        condition=torch.zeros(tokens, 4),
        time=torch.rand(frames, generator=generator),
        role=torch.randint(0, 3, (frames,), generator=generator),
        class_label=torch.tensor([1, -1]),
        text=torch.randn(layout.shape.max_text_tokens, 6, generator=generator),
    )


def make_engine(config: DiTConfig, precision: str, param_persistence_threshold: int = 0):
    """The network under ZeRO-3, its weights from the seed."""
    ranks = init_distributed()
    torch.set_num_threads(1)
    zero = ZeroConfig(stage=3, param_persistence_threshold=param_persistence_threshold, bucket_elements=100_000)
    optim = OptimConfig(warmup_steps=0)
    ds_config = deepspeed_config(zero, precision, 1, optim.clip_grad_norm, ranks.device)
    engine = build_engine(lambda: build_backbone(config), lambda model: build_optimizer(model, optim), ds_config)
    with torch.device("meta"):
        blueprint = build_backbone(config)
    shards = ShardedState(engine)
    shards.initialise(blueprint, lambda model, gather: initialise(model, 0, gather))
    return engine, shards


def constants_seen(model: torch.nn.Module, run) -> dict[str, Tensor]:
    """The rotations that each block is given, the features that each embedding is, and the latent tokens' inputs."""
    seen: dict[str, Tensor] = {}

    def note(name: str, place: int):
        return lambda _, arguments: seen.update({name: arguments[place].clone()})

    handles = [
        module.register_forward_pre_hook(note(name, 0))
        for name, module in model.named_modules()
        if isinstance(module, FeatureMLP) or name == "embedding.latent"
    ]
    handles += [
        block.register_forward_pre_hook(note(f"rotations of block {number}", 4))
        for number, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        run(make_pack())
    for handle in handles:
        handle.remove()
    return seen


def constants() -> dict:
    """What the forward makes of positions, times and counts, built under ``zero.Init`` in bf16 and built plainly."""
    engine, _ = make_engine(MODEL, "bf16")
    plain = build_backbone(replace(MODEL)).bfloat16()
    under_zero, alone = constants_seen(engine.module, engine), constants_seen(plain, plain)
    rope, plain_rope = engine.module.rope, plain.rope
    return {
        "equal": {name: torch.equal(under_zero[name], alone[name]) for name in under_zero},
        "also_alone": under_zero.keys() == alone.keys(),
        "dtypes": sorted({str(weight.dtype) for weight in engine.module.parameters()}),
        "frequency": [str(rope.frequency.dtype), bool((rope.frequency == plain_rope.frequency).all())],
        "axis": [str(rope.axis.dtype), bool((rope.axis == plain_rope.axis).all())],
        "buffers": [name for name, _ in engine.module.named_buffers()],
    }
