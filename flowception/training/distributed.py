"""Ranks: who am I, where do I compute, and what do all of us agree on.

Works under the deepspeed launcher, torchrun, ``srun python``, or alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed

from flowception.errors import ConfigError, FlowceptionError
from flowception.training.devices import check_places, describe_places, find_place, share_places

Value = TypeVar("Value")
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    everyone: str = ""
    """On how many nodes all ranks compute, on what, and how they talk; for a person."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def fill_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not.

    Under Slurm they come from its variables, except for MASTER_ADDR of a job of several nodes, which the batch script
    must set; alone they describe one rank with a free port.

    Raises:
        ConfigError: If a job of several ranks has no MASTER_ADDR.
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
            f"{' and '.join(missing)} not set for {environment['WORLD_SIZE']} ranks; in a Slurm script write: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29500'
        )
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def init_distributed() -> Ranks:
    """Choose this rank's device, see that those of all ranks fit together, and join the process group.

    Returns:
        This process's place in it.

    Raises:
        ConfigError: On all ranks, if one of them has no GPU that is meant to have one, or their devices differ.
    """
    from flowception.training.zero import COLLECTIVE_TIMEOUT, init_deepspeed

    fill_environment()
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    # The process group reuses this store, which must live until then.
    store, *_ = next(torch.distributed.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    places = share_places(find_place(local_rank), rank, world_size, store)
    try:
        check_places(places)
    except ConfigError as error:
        raise of_all_ranks(error) from None
    device = torch.device(places[rank].device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # which DeepSpeed takes for the number of the device
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "nccl" if device.type == "cuda" else "gloo"
    init_deepspeed(backend)
    return Ranks(rank, local_rank, world_size, device, f"{describe_places(places)}, {backend}")


def all_sum(values: list[float], device: torch.device) -> list[float]:
    """The sum of each value over ranks, in float64. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def all_max(value: float, device: torch.device) -> float:
    """The largest of the ranks' values, to the bit the same on all. Collective."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return float(tensor)


def gather_rows(values: list[float], ranks: Ranks) -> list[list[float]]:
    """Every rank's values, float64, in the order of ranks. Collective."""
    own = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    rows = [torch.empty_like(own) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(rows, own)
    return torch.stack(rows).tolist()


def gather_values(value: Value) -> list[Value]:
    """Every rank's value in the order of ranks; small things only. Collective."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank; small things only. Collective."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_main(ranks: Ranks, action: Callable[[], Value], share: bool = False) -> Any:
    """Run ``action`` on rank 0; an error there is raised on all ranks. Collective.

    Args:
        ranks: This process.
        action: What to do.
        share: Whether every rank gets the result; it must be small.

    Returns:
        The result on rank 0, and elsewhere if shared; else None.
    """
    result, failure = None, None
    if ranks.is_main:
        try:
            result = action()
        except FlowceptionError as error:
            failure = error
    failure, shared = broadcast_object((failure, result if share else None))
    if failure is not None:
        raise of_all_ranks(failure)
    return shared if share else result


def together(action: Callable[[], Value]) -> Value:
    """Run ``action``, which has no collectives of its own, on every rank; an error on one is raised on all. Collective.

    Args:
        action: What to do.

    Returns:
        This rank's result.

    Raises:
        FlowceptionError: The error of the first rank that failed; no rank is left waiting for another.
    """
    failure: FlowceptionError | None = None
    try:
        result = action()
    except FlowceptionError as error:
        failure = error
    for rank, found in enumerate(gather_values(failure)):
        if found is not None:
            raise of_all_ranks(type(found)(f"rank {rank}: {found}") if rank else found) from failure
    return result


def of_all_ranks(error: FlowceptionError) -> FlowceptionError:
    """Note on an error that every rank raises it; the first rank alone will print it."""
    error.on_all_ranks = True
    return error
