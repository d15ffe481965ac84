"""Initializes weights from a seed and the parameter names, independent of order, rank and world size.

Constructors do not initialize: under ZeRO-3 (``deepspeed.zero.Init``) a module's parameters are already partitioned
when its parent's constructor runs, and writing to them has no effect. A pass after construction visits each module that
owns parameters, gathers them, and writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[bool]]
"""Gathers partitioned parameters within a ``with`` block; yields True if this process must write them."""


@runtime_checkable
class OwnsParameters(Protocol):
    """A module that defines the initial values of the parameters it owns."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Initial value, float32, of the parameter ``name`` (its name in this module)."""


def _write_here(_: Sequence[nn.Parameter]) -> AbstractContextManager[bool]:
    return nullcontext(True)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch.no_grad()
def initialize(model: nn.Module, seed: int, gather: Gather | None = None) -> None:
    """Set every parameter of a model from ``(seed, parameter name)``.

    Args:
        model: Every module that owns parameters must be ``OwnsParameters``.
        seed: Any integer.
        gather: Gathers partitioned parameters; None if they are not partitioned.

    Raises:
        TypeError: If a module owns parameters but has no ``initial_value``.
    """
    gather = gather or _write_here
    for path, module in model.named_modules():
        owned = list(module.named_parameters(recurse=False))
        if not owned:
            continue
        if not isinstance(module, OwnsParameters):
            raise TypeError(f"{path or 'the model'} ({type(module).__name__}) owns parameters but has no initial_value")
        with gather([parameter for _, parameter in owned]) as writes_here:
            if not writes_here:
                continue
            for name, parameter in owned:
                generator = _generator(seed, f"{path}.{name}")
                parameter.copy_(module.initial_value(name, parameter.shape, generator))
