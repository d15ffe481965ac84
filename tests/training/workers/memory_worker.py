"""Worker side of the memory tests: bytes that an engine actually stores, by part, and bytes that a rank actually
sends."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.utils.groups import _get_zero_param_intra_parallel_group
from torch import Tensor

from flowception.nn.build import build_backbone, count_parameters
from flowception.nn.init import initialize
from flowception.nn.presets import DiTConfig
from flowception.packing.layout import ClipShape, PackInput, build_layout
from flowception.training.checkpointer import Saver
from flowception.training.distributed.collectives import broadcast_object
from flowception.training.distributed.launch import init_distributed
from flowception.training.distributed.sharded_state import MOMENTS, ShardedState
from flowception.training.distributed.zero import ZeroConfig, build_engine, deepspeed_config, optimizer_step
from flowception.training.optim import OptimConfig, build_optimizer
from flowception.training.resume import CheckpointConfig

MODEL = DiTConfig(preset=None, in_channels=8, hidden_size=128, num_layers=3, num_heads=4)
BUCKET_ELEMENTS = 100_000
RING_PASSES = {"all_reduce": 2, "all_gather": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
"""How often a ring sends (W - 1) / W of the full tensor of a collective."""


def pack() -> PackInput:
    layout = build_layout([ClipShape(2, 2, 2)])
    return PackInput(
        layout=layout,
        noisy=torch.ones(layout.shape.token_budget, 8),
        condition=torch.zeros(layout.shape.token_budget, 8),
        time=torch.full((layout.shape.max_frames,), 0.5),
        role=torch.zeros(layout.shape.max_frames, dtype=torch.int64),
        class_label=torch.full((layout.shape.max_clips,), -1),
        text=None,
    )


def storages(tensors) -> dict[int, int]:
    """Bytes of each distinct storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def every_tensor() -> list[Tensor]:
    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, Tensor) and item.device.type == "cpu"]


@contextmanager
def counting_traffic() -> Iterator[Counter]:
    """Bytes that a rank sends in a ring, by collective, counted where DeepSpeed passes tensors to torch."""
    sent: Counter = Counter()
    real = {name: getattr(TorchBackend, name) for name in RING_PASSES}

    def counted(name):
        def call(*given, **named):
            everything = [*given, *named.values()]
            tensors = [item for item in everything if isinstance(item, Tensor | list)]
            size = max(t.nbytes if isinstance(t, Tensor) else sum(part.nbytes for part in t) for t in tensors)
            groups = [item for item in everything if isinstance(item, torch.distributed.ProcessGroup)]
            group = groups[0] if groups else None
            ranks = torch.distributed.get_world_size(group)
            is_node = group is not None and group is _get_zero_param_intra_parallel_group()
            sent["in_group" if is_node else name] += (
                RING_PASSES[name] * size * (ranks - 1) / ranks
            )  # the full tensor is the larger one
            return real[name](*given, **named)

        return call

    for name in real:
        setattr(TorchBackend, name, counted(name))
    try:
        yield sent
    finally:
        for name, method in real.items():
            setattr(TorchBackend, name, method)


def measure(stage: int, precision: str, group: int | None = None, accumulation: int = 2) -> dict:
    """Two optimizer steps: bytes stored by part, sent in the second step, and saved."""
    before = storages(every_tensor())
    ranks = init_distributed()
    torch.set_num_threads(1)
    zero = ZeroConfig(
        stage=stage,
        param_persistence_threshold=0,
        bucket_elements=BUCKET_ELEMENTS,
        max_live_elements=1,
        hierarchical_partition_size=group,
    )
    optim = OptimConfig(warmup_steps=0)
    config = deepspeed_config(zero, precision, accumulation, optim.clip_grad_norm, ranks.device)
    engine = build_engine(
        lambda: build_backbone(MODEL), lambda model: build_optimizer(model, optim, ranks.device), config, ranks.device
    )
    shards = ShardedState(engine)
    with torch.device("meta"):
        blueprint = build_backbone(MODEL)
    shards.initialize(blueprint, lambda model, gather: initialize(model, 0, gather))
    parts = {
        "optimizer": storages(t for moment in MOMENTS for t in shards.tensors(moment)),
        "ema": storages(shards.ema),
        "weights": storages([getattr(p, "ds_tensor", p) for p in engine.module.parameters()] + list(shards.masters)),
    }
    known = before | parts["optimizer"] | parts["ema"] | parts["weights"]
    gradients, second_copies, losses, traffic = [], [], [], []
    for _ in range(2):
        with counting_traffic() as sent:
            losses.append(step(engine, accumulation, known, gradients, second_copies))
            optimizer_step(engine, optim.clip_grad_norm, lambda norm: None, ranks.device)
        traffic.append(sent)
    return {name: sum(found.values()) for name, found in parts.items()} | {
        "parameters": count_parameters(MODEL),
        "gradients": max(gradients),
        "second_copies": max(second_copies),
        "sent": traffic[-1],
        "losses": losses,
        "saved": saved_bytes(shards),
    }


def step(engine, accumulation: int, known: dict[int, int], gradients: list[int], second_copies: list[int]) -> float:
    """Run micro-steps. New memory after each, except communication buckets, is gradients."""
    total = 0.0
    for number in range(accumulation):
        output = engine(pack())
        loss = (output.velocity.float() - 1).square().sum() + output.log_rate.sum()
        engine.backward(loss)
        total += float(loss.detach())
        del output, loss
        parameters = list(engine.module.parameters())
        appeared = storages([*every_tensor(), *(p.grad for p in parameters if p.grad is not None)])
        second = storages(t for p in parameters if (t := getattr(p, "ds_secondary_tensor", None)) is not None)
        appeared = {place: size for place, size in appeared.items() if place not in second}
        second_copies.append(sum(second.values()))
        buckets = (2 * BUCKET_ELEMENTS, 4 * BUCKET_ELEMENTS)
        gradients.append(sum(n for place, n in appeared.items() if place not in known and n not in buckets))
        if number + 1 < accumulation:
            engine.step()
    return total


def saved_bytes(shards: ShardedState) -> int:
    """Size of a checkpoint, all ranks' files together."""
    folder = broadcast_object(tempfile.mkdtemp())
    Saver(folder, CheckpointConfig(), shards).save(1, {})
    size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    torch.distributed.barrier()
    if shards.rank == 0:
        shutil.rmtree(folder)
    return size


def measure_all() -> dict[str, dict]:
    """Autocast (stages 0 and 1 in bf16) and groups run last, because DeepSpeed keeps both for the rest of the
    process."""
    cases = [(3, "fp32"), (3, "bf16"), (2, "fp32"), (2, "bf16"), (1, "fp32"), (0, "fp32"), (1, "bf16"), (0, "bf16")]
    found = {f"{stage} {precision}": measure(stage, precision) for stage, precision in cases}
    return found | {"3 fp32 in groups": measure(3, "fp32", group=2)}
