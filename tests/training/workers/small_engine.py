"""Worker side of the engine tests: a small model, its data, and a few steps of training under any ZeRO stage."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from flowception.checkpoint.format import KINDS, checkpoint_dir
from flowception.training import resume
from flowception.training.checkpointer import Saver
from flowception.training.distributed.collectives import all_sum, gather_values
from flowception.training.distributed.launch import init_distributed
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.distributed.zero import ZeroConfig, build_engine, deepspeed_config, optimizer_step
from flowception.training.optim import OptimConfig, build_optimizer
from flowception.training.resume import CheckpointConfig

WIDTH = 24
EMA_DECAY = 0.9
OPTIM = OptimConfig(lr=3e-3, weight_decay=0.1, warmup_steps=0, clip_grad_norm=0.5)


class Small(nn.Module):
    """Linear layers of odd sizes, an embedding, a norm and an output that starts at zero."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)
        self.first = nn.Linear(5, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, 11)
        self.last = nn.Linear(11, 3)
        nn.init.zeros_(self.last.weight)

    def forward(self, x, label):
        hidden = self.norm(torch.nn.functional.gelu(self.first(x.to(self.first.weight.dtype)) + self.table(label)))
        return self.last(torch.tanh(self.second(hidden)))


def initialize(model, gather=None):
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            continue
        if gather is None:
            _write(name, parameters)
        else:
            with gather(list(parameters.values())) as writes:
                if writes:
                    _write(name, parameters)


@torch.no_grad()
def _write(module_name, parameters):
    for name, parameter in parameters.items():
        seed = int.from_bytes(hashlib.sha256(f"{module_name}.{name}".encode()).digest()[:4], "little")
        values = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        if (module_name, name) == ("last", "weight"):
            values.zero_()
        parameter.copy_(values)


def micro_batch(step, index):
    """Micro-batch ``index`` of a step; the number of rows varies, as in packs."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    rows = 3 + (5 * step + 3 * index) % 7
    x = torch.randn(rows, 5, generator=generator)
    return x, torch.randint(0, 7, (rows,), generator=generator), torch.sin(3 * x[:, :3])


def make_engine(stage, precision="fp32", accumulation_steps=1, optim=OPTIM):
    ranks = init_distributed()
    torch.set_num_threads(1)
    zero = ZeroConfig(stage=stage, param_persistence_threshold=30, bucket_elements=100_000)
    config = deepspeed_config(zero, precision, accumulation_steps, optim.clip_grad_norm, ranks.device)
    engine = build_engine(Small, lambda model: build_optimizer(model, optim, ranks.device), config, ranks.device)
    shards = ShardedState(engine)
    with torch.device("meta"):
        blueprint = Small()
    shards.initialize(blueprint, initialize)
    return ranks, engine, shards


def train(ranks, engine, shards, steps, micro_batches, optim=OPTIM):
    """Losses (the mean over a step's rows) of the given steps; ``micro_batches`` in a step over all ranks."""
    accumulation = -(-micro_batches // ranks.world_size)
    losses = []
    for step in steps:
        batches = [micro_batch(step, i) for i in range(micro_batches)]
        rows = sum(len(x) for x, *_ in batches)
        total = 0.0
        shards.set_learning_rate(optim.lr / (1 + step))
        for index in range(accumulation):
            number = index * ranks.world_size + ranks.rank
            x, label, target = batches[number % micro_batches]
            loss_sum = (engine(x, label) - target).float().square().sum() * (number < micro_batches)
            engine.backward(loss_sum * accumulation * ranks.world_size / rows)
            if index + 1 < accumulation:
                engine.step()
            total += float(loss_sum.detach())
        outcome = optimizer_step(engine, optim.clip_grad_norm, accept, ranks.device)
        assert outcome.applied
        shards.update_ema(EMA_DECAY)
        losses.append((all_sum([total], ranks.device)[0] / rows, outcome.grad_norm))
    return losses


def run(stage, steps, precision="fp32", micro_batches=3, run_dir=None, load_step=None, save_steps=()):
    """Train to ``steps``, from the start or from a checkpoint, saving at ``save_steps``."""
    world_size = int(os.environ["WORLD_SIZE"])
    ranks, engine, shards = make_engine(stage, precision, -(-micro_batches // world_size))
    if stage:
        assert engine.optimizer.communication_data_type == torch.float32
        assert engine.optimizer.gradient_accumulation_dtype == torch.float32
    first = 0
    if load_step is not None:
        found = resume.find_latest(run_dir, shards)
        assert found is not None
        assert found.name == f"step_{load_step:08d}", found
        resume.load(found, shards)
        first = load_step
    saver = run_dir and Saver(run_dir, CheckpointConfig(keep_last=None), shards)
    losses, begin = [], outputs(engine, shards)
    for step in range(first, steps + 1):
        if step in save_steps:
            saver.begin(step, {"step": step})
        if step < steps:
            losses += train(ranks, engine, shards, [step], micro_batches)
    if saver:
        assert not save_steps or saver.wait() == save_steps[-1], saver.failure
        saver.close()
    end = outputs(engine, shards)
    sums = {
        kind: {name: t.double().sum().item() for name, t in full(shards, kind).items()} for kind in ("weight", "ema")
    }
    result = {"losses": losses, "begin": begin, "end": end, "sums": sums, "optimizer_steps": shards.optimizer_steps}
    if run_dir is None:
        accumulation = -(-micro_batches // world_size)
        poison = math.nan if ranks.rank == 1 else 1.0
        result["poisoned"] = refused_step(ranks, engine, shards, accumulation, poison, accept)
        result["refused"] = refused_step(ranks, engine, shards, accumulation, 1.0, lambda norm: f"{norm!r} is refused")
        result["after"] = train(ranks, engine, shards, [steps], micro_batches)[0]
    return result


def accept(norm):
    return None


def refused_step(ranks, engine, shards, accumulation, factor, refuse):
    """A step with the gradient of a sum times ``factor``: the optimizer's outcome, and the state after it."""
    x, label, _ = micro_batch(0, 0)
    for index in range(accumulation):
        engine.backward(engine(x, label).float().sum() * factor)
        if index + 1 < accumulation:
            engine.step()
    before = held(shards)
    outcome = optimizer_step(engine, OPTIM.clip_grad_norm, refuse, ranks.device)
    return {
        "applied": outcome.applied,
        "refused": outcome.refused,
        "unchanged": held(shards) == before,
        "end": outputs(engine, shards),
        "optimizer_steps": shards.optimizer_steps,
    }


def held(shards):
    """A digest of this rank's masters, moments and EMA."""
    digest = hashlib.sha256()
    for kind in KINDS:
        for tensor in shards.tensors(kind):
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def full(shards, kind):
    """Full parameters assembled from the fragments of all ranks."""
    own = [(f.name, f.shape, *shards.saved_range(f), f.start, v.tolist()) for f, v in shards.views(kind)]
    found = {}
    for part in gather_values(own):
        for name, shape, low, high, start, values in part:
            whole = found.setdefault(name, torch.full((math.prod(shape),), math.nan))
            whole[low:high] = torch.tensor(values[low - start : high - start])
    return {name: found[name].view(shards.parameter_shapes[name]) for name in sorted(found)}


def train_every_stage(steps):
    result = {str(stage): run(stage, steps) for stage in range(4)}
    return result | {f"{stage} bf16": run(stage, steps, "bf16") for stage in range(4)}


def train_and_resume(folder):
    """For some stages and types: six steps, and the last three again from the checkpoint of step 3."""
    result = {}
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")):
        whole, again = (Path(folder, f"{stage}-{precision}-{part}") for part in ("whole", "again"))
        uninterrupted = run(stage, 6, precision, run_dir=whole, save_steps=(3, 6))
        if int(os.environ["RANK"]) == 0:
            shutil.copytree(checkpoint_dir(whole, 3), checkpoint_dir(again, 3))
        resumed = run(stage, 6, precision, run_dir=again, load_step=3, save_steps=(6,))
        result[f"{stage}-{precision}"] = [uninterrupted, resumed]
    return result


def load_and_save(source, folder, stages):
    """Load one checkpoint at several stages, and save it again immediately."""
    for stage in stages:
        run_dir = Path(folder, f"stage-{stage}")
        if int(os.environ["RANK"]) == 0:
            shutil.copytree(checkpoint_dir(source, 3), checkpoint_dir(run_dir, 3))
        run(stage, 3, run_dir=run_dir, load_step=3, save_steps=(3,))


@torch.no_grad()
def outputs(engine, shards):
    """Model outputs with its weights, with its EMA, and with its weights again."""
    x, label, _ = micro_batch(99, 0)
    engine.eval()
    result = []
    for _ in range(3):
        result.append(engine(x, label).float().flatten().tolist())
        shards.swap_ema()
    shards.swap_ema()
    engine.train()
    return result
