"""Worker side of the tests of the real network under ZeRO, built and run by DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor, nn
from torch._dynamo.utils import counters

from flowception.nn.build import build_backbone
from flowception.nn.init import initialize
from flowception.nn.layers import FeatureMLP, Linear
from flowception.nn.presets import DiTConfig
from flowception.packing.layout import ClipShape, PackInput, build_layout
from flowception.training.distributed.launch import init_distributed
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.distributed.zero import ZeroConfig, backward, build_engine, deepspeed_config, optimizer_step
from flowception.training.optim import OptimConfig, build_optimizer
from tests.tracing import TRACED

MODEL = DiTConfig(preset=None, in_channels=4, hidden_size=64, num_layers=2, num_heads=2, text_dim=6, num_classes=3)


CLIPS = (ClipShape(30, 4, 6, 9), ClipShape(5, 3, 2, 4))
"""Ranks and positions far enough apart to reveal rounded frequencies."""


def make_pack(seed: int = 0, clips: Sequence[ClipShape] = CLIPS) -> PackInput:
    """Two clips with text."""
    generator = torch.Generator().manual_seed(seed)
    layout = build_layout(clips)
    tokens, frames = layout.shape.token_budget, layout.shape.max_frames
    return PackInput(
        layout=layout,
        noisy=torch.randn(tokens, 4, generator=generator),
        condition=torch.zeros(tokens, 4),
        time=torch.rand(frames, generator=generator),
        role=torch.randint(0, 3, (frames,), generator=generator),
        class_label=torch.tensor([1, -1]),
        text=torch.randn(len(layout.text_token), 6, generator=generator),
    )


def nothing_zero(model: nn.Module) -> nn.Module:
    """The network, with its zero-initialized layers initialized like the others."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.zero = False
    return model


def make_engine(config: DiTConfig, precision: str, stage: int = 3, accumulation_steps: int = 1):
    """The network under ZeRO with every weight partitioned at stage 3, its values from the seed; and its state."""
    ranks = init_distributed()
    torch.set_num_threads(1)
    zero = ZeroConfig(stage=stage, param_persistence_threshold=0, bucket_elements=100_000)
    optim = OptimConfig(warmup_steps=0)
    ds_config = deepspeed_config(zero, precision, accumulation_steps, optim.clip_grad_norm, ranks.device)
    engine = build_engine(
        lambda: build_backbone(config),
        lambda model: build_optimizer(model, optim, ranks.device),
        ds_config,
        ranks.device,
    )
    with torch.device("meta"):
        blueprint = nothing_zero(build_backbone(config))
    shards = ShardedState(engine)
    shards.initialize(blueprint, lambda model, gather: initialize(model, 0, gather))
    return engine, shards


def make_plain(config: DiTConfig, precision: str) -> nn.Module:
    """The same network in plain PyTorch."""
    model = nothing_zero(build_backbone(config))
    initialize(model, 0)
    return model.bfloat16() if precision == "bf16" else model


def constants_seen(model: torch.nn.Module, run) -> dict[str, Tensor]:
    """Rotations that each block receives, features of each embedding, and inputs of the latent tokens."""
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
    """What the forward pass computes from positions, times and counts, built under ``zero.Init`` in bf16 and without
    it."""
    (engine, _), plain = make_engine(MODEL, "bf16"), make_plain(MODEL, "bf16")
    under_zero, alone = constants_seen(engine.module, engine), constants_seen(plain, plain)
    rope, plain_rope = engine.module.rope, plain.rope
    return {
        "equal": {name: torch.equal(under_zero[name], alone[name]) for name in under_zero},
        "also_alone": under_zero.keys() == alone.keys(),
        "dtypes": sorted({str(weight.dtype) for weight in engine.module.parameters()}),
        "frequency": [str(rope.frequency.dtype), bool((rope.frequency == plain_rope.frequency).all())],
        "axis": [str(rope.axis.dtype), bool((rope.axis == plain_rope.axis).all())],
        "buffers": [name for name, _ in engine.module.named_buffers()],
        "one_step": [one_step(MODEL, "bf16", engine), one_step_alone(MODEL, "bf16")],
        "module_stack": module_stack(micro_steps=200),
        "compiled": one_step_traced(replace(MODEL, compile="blocks"), "bf16"),
    }


def module_stack(micro_steps: int) -> list[int]:
    """Length of DeepSpeed's module stack after each micro-step, with all blocks recomputed."""
    config = replace(MODEL, hidden_size=16, num_layers=1, text_dim=None, num_classes=0, activation_checkpointing=True)
    engine, _ = make_engine(config, "fp32", accumulation_steps=micro_steps)
    pack, entries = replace(make_pack(clips=[ClipShape(2, 1, 1)] * 2), text=None), []
    for _ in range(micro_steps):
        backward(engine, loss_of(engine(pack)))
        engine.step()
        entries.append(len(FWD_MODULE_STACK))
    return entries


def loss_of(output) -> Tensor:
    """Loss over both heads, with both means of order 1."""
    return (output.velocity - 1.0).square().mean() + (output.log_rate - 1.0).square().mean()


def one_step(config: DiTConfig, precision: str, engine=None) -> dict:
    """Log-rates, velocities and gradient norm of a step under ZeRO-3."""
    engine = engine or make_engine(config, precision)[0]
    output = engine(make_pack())
    engine.backward(loss_of(output))
    norm = optimizer_step(engine, None, lambda _: None, torch.device("cpu")).grad_norm
    return {"log_rate": output.log_rate.tolist(), "velocity": output.velocity.tolist(), "grad_norm": norm}


def one_step_traced(config: DiTConfig, precision: str) -> dict:
    """The same, compiled with a backend that needs no C++ compiler, and the number of graphs."""
    torch.compile = partial(torch.compile, backend=TRACED)
    return {**one_step(config, precision), "graphs": counters["stats"]["unique_graphs"]}


def one_step_alone(config: DiTConfig, precision: str) -> dict:
    """The same in plain PyTorch."""
    model = make_plain(config, precision)
    output = model(make_pack())
    loss_of(output).backward()
    norm = torch.nn.utils.get_total_norm([weight.grad.float() for weight in model.parameters()])
    return {"log_rate": output.log_rate.tolist(), "velocity": output.velocity.tolist(), "grad_norm": float(norm)}


def compiled() -> dict[str, dict]:
    """A step under ZeRO-3 with compiled leaves, without and with recomputation of every block, and the eager step."""
    ways = {
        "eager": {},
        "compiled": {"compile": "leaves"},
        "again": {"compile": "leaves", "activation_checkpointing": True},
    }
    return {
        f"{way} {precision}": one_step(replace(MODEL, **changes), precision)
        for way, changes in ways.items()
        for precision in ("fp32", "bf16")
    }
