"""The rank of this process, and collectives on small values, with errors that all ranks raise together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed

from flowception.errors import FlowceptionError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This rank, its device, and the number of ranks."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    everyone: str = ""
    """Nodes, devices and backend of all ranks, as text for the user."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def all_sum(values: list[float], device: torch.device) -> list[float]:
    """Sum each value over ranks, in float64. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def all_max(value: float, device: torch.device) -> float:
    """Maximum over ranks, bit-identical on all of them. Collective."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return float(tensor)


def gather_rows(values: list[float], ranks: Ranks) -> list[list[float]]:
    """Gather every rank's values, in float64 and rank order. Collective."""
    own = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    rows = [torch.empty_like(own) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(rows, own)
    return torch.stack(rows).tolist()


def gather_values(value: Value) -> list[Value]:
    """Gather every rank's value in rank order; small objects only. Collective."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank; small objects only. Collective."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_main(ranks: Ranks, action: Callable[[], Value], share: bool = False) -> Any:
    """Run ``action`` on rank 0; an error there is raised on all ranks. Collective.

    Args:
        ranks: This rank.
        action: Function to run.
        share: Whether to send the result, which must be small, to every rank.

    Returns:
        The result on rank 0, and on the other ranks if shared; else None.
    """
    result, failure = None, None
    if ranks.is_main:
        try:
            result = action()
        except FlowceptionError as error:
            failure = error
    failure, shared = broadcast_object((failure, result if share else None))
    if failure is not None:
        raise mark_on_all_ranks(failure)
    return shared if share else result


def run_on_all_ranks(action: Callable[[], Value]) -> Value:
    """Run ``action`` on every rank; an error on one rank is raised on all. Collective.

    Args:
        action: Function to run, without collectives.

    Returns:
        This rank's result.

    Raises:
        FlowceptionError: On all ranks, the error of the first rank that failed, so that no rank waits for another.
    """
    failure: FlowceptionError | None = None
    try:
        result = action()
    except FlowceptionError as error:
        failure = error
    for rank, found in enumerate(gather_values(failure)):
        if found is not None:
            raise mark_on_all_ranks(type(found)(f"rank {rank}: {found}") if rank else found) from failure
    return result


def mark_on_all_ranks(error: FlowceptionError) -> FlowceptionError:
    """Mark an error as raised on every rank, so that only rank 0 prints it."""
    error.on_all_ranks = True
    return error
