"""Worker side of the tests of compiled blocks under ZeRO: a few steps at a stage, eager and compiled."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch._dynamo.utils import counters

from flowception.nn import dit
from flowception.training.distributed.zero import backward, optimizer_step
from tests.training.workers.network_worker import MODEL, loss_of, make_engine, make_pack
from tests.training.workers.small_engine import EMA_DECAY, full

STEPS, MICRO_STEPS = 3, 2


def steps(config, stage: int, precision: str) -> dict:
    """Losses, gradient norms and the contents of a checkpoint, after a few steps and a pass without gradients."""
    engine, shards = make_engine(config, precision, stage=stage, accumulation_steps=MICRO_STEPS)
    rank, losses, norms = torch.distributed.get_rank(), [], []
    for step in range(STEPS):
        shards.set_learning_rate(1e-3)
        for number in range(MICRO_STEPS):
            loss = loss_of(engine(make_pack(10 * step + 2 * number + rank)))
            backward(engine, loss)
            losses.append(float(loss.detach()))
            if number + 1 < MICRO_STEPS:
                engine.step()
        norms.append(optimizer_step(engine, 1.0, lambda _: None, torch.device("cpu")).grad_norm)
        shards.update_ema(EMA_DECAY)
    with torch.no_grad():
        losses.append(float(loss_of(engine(make_pack(99)))))
    state = {f"{kind} {name}": t for kind in ("weight", "exp_avg", "ema") for name, t in full(shards, kind).items()}
    return {"losses": losses, "norms": norms, "state": state}


def deviations(ours: dict, theirs: dict) -> dict[str, float]:
    """Largest relative difference of losses and norms, and of tensors relative to their largest elements."""

    def of_tensors(one, other):
        return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))

    found = {name: of_tensors(torch.tensor(ours[name]), torch.tensor(theirs[name])) for name in ("losses", "norms")}
    return found | {"state": max(of_tensors(ours["state"][name], theirs["state"][name]) for name in theirs["state"])}


def every_stage(precision: str, backend: str) -> dict[str, dict]:
    """By stage and checkpointing: differences between compiled and eager blocks, and the number of graphs."""
    torch.compile = partial(torch.compile, backend=backend)
    found = {}
    for stage in range(4):
        for again in (0, MODEL.num_layers):
            torch._dynamo.reset()
            dit.compiled_block.cache_clear()
            counters.clear()
            config = replace(MODEL, activation_checkpointing=again)
            compiled = steps(replace(config, compile="blocks"), stage, precision)
            graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
            eager = steps(config, stage, precision)
            found[f"{stage} {again}"] = {"graphs": graphs, "breaks": breaks} | deviations(compiled, eager)
    return found
