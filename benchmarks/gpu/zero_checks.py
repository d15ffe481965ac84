"""Compares training with DeepSpeed at every ZeRO stage, on one rank, with the same training in plain torch.

Plain torch keeps float32 master weights and AdamW states and computes like ``training.distributed.zero``: in float32;
in bfloat16 with autocast at stages 0 and 1; with bfloat16 copies of the weights at stages 2 and 3.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.outcome import PASS, CheckFailed, Outcome
from benchmarks.gpu.scene import Case, Scene, training_loss
from flowception.data.loader import StepBatch
from flowception.nn.build import build_backbone
from flowception.training.distributed.collectives import Ranks
from flowception.training.distributed.launch import init_distributed
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.distributed.zero import ZeroConfig, build_engine, deepspeed_config, optimizer_step
from flowception.training.optim import build_optimizer
from flowception.training.step import run_micro_steps

STEPS, REFUSED_STEP = 10, 5
REFUSAL = "refused to see what is left of it"
_LARGEST = {"fp32": 1e-3, "bf16": 5e-3}
"""Relative difference of a step's loss; on a CPU it is below 1e-6 and 1e-5. A step more or less makes 1e-2."""
_LEARNING_RATE = 3e-3


def build(case: Case, stage: int, precision: str, ranks: Ranks, packs: int = 2) -> tuple[Any, ShardedState]:
    """The engine of ``training.trainer``, with initial weights."""
    config, device = case.config, ranks.device
    zero = ZeroConfig(stage=stage, param_persistence_threshold=0)
    settings = deepspeed_config(zero, precision, packs, config.optim.clip_grad_norm, device)  # type: ignore[arg-type]
    engine = build_engine(
        lambda: build_backbone(config.model),
        lambda model: build_optimizer(model, config.optim, device),
        settings,
        device,
    )
    shards = ShardedState(engine)
    with torch.device("meta"):
        blueprint: Any = build_backbone(config.model)
    shards.initialize(blueprint, lambda model, gather: model.initialize(0, gather))  # type: ignore[operator]
    return engine, shards


def by_deepspeed(case: Case, stage: int, precision: str, ranks: Ranks, batches: list[StepBatch]) -> list[float]:
    """Losses of every step.

    Raises:
        CheckFailed: If the rejected step changed anything, or another step was rejected.
    """
    engine, shards = build(case, stage, precision, ranks)
    shards.set_learning_rate(_LEARNING_RATE)
    losses = []
    for number, batch in enumerate(batches):
        seen = run_micro_steps(engine, batch, ranks, 1.0)
        plan = batch.step_plan
        losses.append(seen.velocity_sum / plan.velocity_denominator + seen.insertion_sum / plan.insertion_denominator)
        wanted = REFUSAL if number == REFUSED_STEP else None
        before = [part.clone() for kind in ("weight", "exp_avg", "exp_avg_sq") for part in shards.tensors(kind)]
        outcome = optimizer_step(engine, case.config.optim.clip_grad_norm, lambda norm, why=wanted: why, ranks.device)  # type: ignore[misc]
        if outcome.refused != wanted:
            raise CheckFailed(
                f"ZeRO-{stage} {precision}: step {number} must be rejected for {wanted!r}, got {outcome.refused!r}"
            )
        after = [part for kind in ("weight", "exp_avg", "exp_avg_sq") for part in shards.tensors(kind)]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if same != (wanted is not None):
            raise CheckFailed(
                f"ZeRO-{stage} {precision}: step {number} {'did not change' if same else 'changed'} weights or moments"
            )
    engine.destroy()
    return losses


def by_torch(case: Case, arithmetic: str, device: torch.device, batches: list[StepBatch]) -> list[float]:
    """Losses of every step, with arithmetic ``fp32``, ``autocast`` or ``bf16``."""
    config = case.config
    masters: Any = build_backbone(config.model)
    masters.initialize(0).to(device)
    model: nn.Module = build_backbone(config.model).to(device, torch.bfloat16) if arithmetic == "bf16" else masters
    optimizer = build_optimizer(masters, config.optim, device)
    for group in optimizer.param_groups:
        group["lr"] = _LEARNING_RATE
    losses = []
    for number, batch in enumerate(batches):
        losses.append(_accumulate(masters, model, arithmetic, batch, device))
        if number != REFUSED_STEP:
            torch.nn.utils.clip_grad_norm_(masters.parameters(), config.optim.clip_grad_norm or float("inf"))
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def _accumulate(masters: nn.Module, model: nn.Module, arithmetic: str, batch: StepBatch, device: torch.device) -> float:
    """One step's forward and backward passes; gradients accumulate in the float32 master weights."""
    if model is not masters:
        with torch.no_grad():
            for copy, master in zip(model.parameters(), masters.parameters(), strict=True):
                copy.copy_(master)
    total = torch.zeros((), device=device)
    for host_pack in batch.packs:
        pack = host_pack.to(device)
        autocast = torch.autocast(device.type, torch.bfloat16) if arithmetic == "autocast" else nullcontext()
        with autocast:
            output = model(pack)
        loss: Tensor = training_loss(output, pack, batch.step_plan, 1.0)
        loss.backward()
        total += loss.detach()
        if model is not masters:
            for copy, master in zip(model.parameters(), masters.parameters(), strict=True):
                if copy.grad is not None:
                    master.grad = copy.grad.float() + (0.0 if master.grad is None else master.grad)
                    copy.grad = None
    return float(total)


def every_stage(scene: Scene) -> Outcome:
    """All stages and both precisions."""
    case = scene.small("model.compile=off", "model.activation_checkpointing=false")
    ranks = init_distributed()
    batches = [case.batch(step) for step in range(STEPS)]
    plain = {name: by_torch(case, name, scene.device, batches) for name in ("fp32", "autocast", "bf16")}
    figures: dict[str, Any] = {"plain": plain, "backend": torch.distributed.get_backend()}
    worst = dict.fromkeys(_LARGEST, 0.0)
    for precision in _LARGEST:
        for stage in range(4):
            reference = plain["fp32" if precision == "fp32" else "autocast" if stage < 2 else "bf16"]
            losses = by_deepspeed(case, stage, precision, ranks, batches)
            difference = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
            figures[f"ZeRO-{stage} {precision}"] = {"difference": difference, "losses": losses}
            worst[precision] = max(worst[precision], difference)
    fell = plain["fp32"][-1] / plain["fp32"][0]
    said = (
        f"{STEPS} steps by {figures['backend']}, one refused, loss to {fell:.2f} of the first; largest difference to "
        f"plain torch fp32 {worst['fp32']:.2g}, bf16 {worst['bf16']:.2g}"
    )
    bad = [name for name, largest in _LARGEST.items() if not worst[name] <= largest]
    if bad:
        raise CheckFailed(f"{said}; at most {_LARGEST} are allowed", figures)
    return Outcome(PASS, said, figures)
