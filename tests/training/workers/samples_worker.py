"""Worker side of the sample tests: runs with and without samples, in one process group."""

from __future__ import annotations

from pathlib import Path

import torch

from flowception.training.config import load_config
from flowception.training.distributed.collectives import on_main
from flowception.training.distributed.launch import init_distributed
from flowception.training.signals import StopFlag
from flowception.training.trainer import train
from tests.training.workers.toy_set import write_config
from train.main import _make_sampler

TASKS = {"t2v": 0.2, "i2v": 0.2, "v2v": 0.2, "interpolation": 0.2, "completion": 0.2}


def settings(**changes):
    wanted = {"max_steps": 4, "tasks": TASKS, "model__in_channels": 12, "model__num_layers": 1}
    wanted |= {"validation__every_steps": None, "checkpoint__save_every_steps": 4}
    return wanted | {"samples__num_inference_steps": 4} | changes


def scenarios(folder):
    torch.set_num_threads(1)
    ranks = init_distributed()

    def run(name, **changes):
        path = Path(folder, f"{name}.yaml")
        target = Path(folder, name)
        on_main(ranks, lambda: write_config(path, target, Path(folder, "shards"), **settings(**changes)) and None)
        return train(load_config([path]), ranks, StopFlag(), _make_sampler)

    on_main(ranks, lambda: Path(folder, "blocked").mkdir() or Path(folder, "blocked", "samples").touch())
    return {
        "plain": run("plain"),
        "sampled": run("sampled", samples__every_steps=2, samples__num_clips=5),
        "ordered": run("ordered", samples__every_steps=4, samples__num_clips=2, delay_law="left_to_right", max_steps=4),
        "blocked": run("blocked", samples__every_steps=2, samples__num_clips=2),
    }
