"""Worker side of the device tests: what each rank of a job learns about the others."""

from __future__ import annotations

import os

import torch

from flowception.errors import ConfigError
from flowception.training.distributed.launch import init_distributed


def meet():
    """Join the process group as a run does, and communicate."""
    ranks = init_distributed()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return [ranks.everyone, float(total)]


def rank_1_of_a_node_without_a_working_driver():
    """Rank 1 does not see its GPU. No rank may continue or wait."""
    if os.environ["RANK"] == "1":
        del os.environ["DS_ACCELERATOR"]
        os.environ["SLURM_GPUS_ON_NODE"] = "8"
        torch.cuda.is_available = lambda: False
    try:
        init_distributed()
    except ConfigError as error:
        return [str(error), error.on_all_ranks, torch.distributed.is_initialized()]
    return "joined"
