"""Worker side of the watchdog tests: jobs where one rank stops. Each touches files to report its progress."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from flowception.training.distributed.collectives import Ranks
from flowception.training.distributed.watchdog import Watchdog

SOON_S = 2.0


def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.01)


def asleep():
    while True:
        time.sleep(0.01)


def job(folder, victim, poll_s, victim_notices):
    """Three steps, then the victim never joins a collective. The other waits until the parent touches ``now``."""
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ranks = Ranks(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    with Watchdog(folder, ranks, hang_timeout_s=3600.0, data_stall_warning_s=None, poll_s=poll_s) as watchdog:
        for step in (1, 2, 3):
            with watchdog.phase("forward", step):
                torch.distributed.all_reduce(torch.ones(1))
        if rank == victim:
            with watchdog.phase("backward"):
                Path(folder, "asleep").touch()
                if victim_notices:
                    watchdog.hang_timeout_s = SOON_S
                asleep()
        wait_for(Path(folder, "now"))
        with watchdog.phase("backward"):
            watchdog.hang_timeout_s = SOON_S
            torch.distributed.all_reduce(torch.ones(1))


def healthy(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ranks = Ranks(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu"))
    opened = Watchdog(folder, ranks, hang_timeout_s=1200.0, data_stall_warning_s=60.0, poll_s=0.02)
    with opened as watchdog, watchdog.phase("forward", 1):
        for other in range(2):
            wait_for(Path(folder, "heartbeats", f"rank_{other:05d}.json"))
        torch.distributed.barrier()
    torch.distributed.barrier()
    return sorted(os.listdir(Path(folder, "heartbeats")))


def hanging_run(folder):
    """A run of the trainer whose rank 1 hangs reading its fourth step's clips."""
    from flowception.shards.reader import ShardReader
    from tests.training.workers.trainer_worker import run

    rank, real_read, real_phase, seen = os.environ["RANK"], ShardReader.read_clip, Watchdog.phase, {}

    def phase(watchdog, name, step=None):
        watchdog._poll_s, seen["watchdog"], seen["step"] = 0.5, watchdog, step or seen.get("step", 0)
        if seen["step"] == 4 and name != "data":  # rank 0 waits for rank 1 in a phase after the one that hangs
            watchdog.hang_timeout_s = SOON_S
        return real_phase(watchdog, name, step)

    def read_clip(reader, row, frames):
        if seen.get("step") == 4:
            if rank == "1":
                seen["watchdog"].hang_timeout_s = SOON_S
                Path(folder, "asleep").touch()
                asleep()
            wait_for(Path(folder, "asleep"))
        return real_read(reader, row, frames)

    ShardReader.read_clip, Watchdog.phase = read_clip, phase
    run(folder, "run")
