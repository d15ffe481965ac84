"""Ranks: who am I, where do I compute, and what do all of us agree on.

Works under the deepspeed launcher, torchrun, ``srun python``, or alone.
"""

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
        raise mark_on_all_ranks(failure)
    return shared if share else result


def run_on_all_ranks(action: Callable[[], Value]) -> Value:
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
            raise mark_on_all_ranks(type(found)(f"rank {rank}: {found}") if rank else found) from failure
    return result


def mark_on_all_ranks(error: FlowceptionError) -> FlowceptionError:
    """Note on an error that every rank raises it; the first rank alone will print it."""
    error.on_all_ranks = True
    return error
