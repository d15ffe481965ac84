"""Join the process group under the deepspeed launcher, torchrun, ``srun python``, or as a single process."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

import torch
import torch.distributed

from flowception.errors import ConfigError
from flowception.progress import show_log
from flowception.training.distributed.collectives import Ranks, mark_on_all_ranks
from flowception.training.distributed.devices import check_devices, describe_devices, find_device, share_devices

logger = logging.getLogger(__name__)

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def fill_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT if the launcher did not.

    Under Slurm the ranks come from its variables, but the batch script must set MASTER_ADDR and MASTER_PORT. A single
    process becomes rank 0 of 1 with a free port.

    Raises:
        ConfigError: If a job of several ranks has no MASTER_ADDR or MASTER_PORT.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        environment.setdefault("LOCAL_RANK", "0")
    elif "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID") and "SLURM_NTASKS" in environment:
        for name, slurm_name in _SLURM.items():
            environment[name] = environment[slurm_name]
    else:
        environment.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    several = int(environment["WORLD_SIZE"]) > 1
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if several and missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be set for {environment['WORLD_SIZE']} ranks; in a Slurm script write: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29500'
        )
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def init_distributed() -> Ranks:
    """Select this rank's device, check that all ranks are compatible, and join the process group.

    This also turns on the package's log, which rank 0 shows in full (``progress.show_log``).

    Returns:
        This rank.

    Raises:
        ConfigError: On all ranks, if one of them should have a GPU but has none, or their devices differ.
    """
    from flowception.training.distributed.zero import COLLECTIVE_TIMEOUT, init_deepspeed

    fill_environment()
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    show_log(rank)
    # Keep this store alive: the process group reuses it.
    store, *_ = next(torch.distributed.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    devices = share_devices(find_device(local_rank), rank, world_size, store)
    try:
        check_devices(devices)
    except ConfigError as error:
        raise mark_on_all_ranks(error) from None
    device = torch.device(devices[rank].device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed uses it as the device index
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "nccl" if device.type == "cuda" else "gloo"
    init_deepspeed(backend)
    everyone = f"{describe_devices(devices)}, {backend}"
    logger.info("%s", everyone)
    return Ranks(rank, local_rank, world_size, device, everyone)
