"""A rank's shard of the training state, by parameter name, at any ZeRO stage.

DeepSpeed keeps the float32 weights that a rank updates in a few flat master tensors. The moments and the EMA have the
same layout. A ``Fragment`` maps a range of a parameter to its location in a master:

* stage 0: a master is a complete parameter, replicated on every rank; the ranks divide the saving;
* stages 1 and 2: a master is this rank's part of the concatenated parameters of a group, so it may split a parameter;
* stage 3: a master concatenates this rank's part of every parameter of a group.

Where they are, only DeepSpeed's internals know: at stages 1 and 2 ``single_partition_of_fp32_groups``,
``round_robin_bit16_groups``, ``round_robin_bit16_offsets``, ``partition_size`` and ``update_lp_params`` of its
optimizer; at stage 3 ``fp32_partitioned_groups_flat``, ``grad_position``, ``get_param_id``, the
``checkpoint_event_prologue`` and ``checkpoint_event_epilogue``, and ``_reassign_or_swap_out_partitioned_parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowception.nn.init import Gather
from flowception.training.distributed.zero import full_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``stop`` of a flattened parameter, stored at ``offset`` of master ``master``."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    master: int
    offset: int


def split_evenly(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The range of ``count`` elements assigned to a rank: equal chunks, the last ones shorter or empty."""
    chunk = -(-count // world_size)
    return min(rank * chunk, count), min((rank + 1) * chunk, count)


class ShardedState:
    """Weights, moments and EMA stored on this rank."""

    def __init__(self, engine: Any) -> None:
        """Find the masters of an engine, and create its optimizer state and the EMA.

        The weights are undefined until ``initialize`` or ``training.resume.load``.
        """
        self.engine = engine
        self.stage: int = engine.zero_optimization_stage()
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._optimizer = engine.optimizer if self.stage == 0 else engine.optimizer.optimizer
        self.masters, self.fragments = self._find()
        self._make_optimizer_state()
        self.ema = [master.detach().clone() for master in self.masters]

    def _find(self) -> tuple[list[Tensor], list[Fragment]]:
        named = list(self.engine.module.named_parameters())
        if self.stage == 0:
            return [p for _, p in named], [
                Fragment(name, tuple(p.shape), 0, p.numel(), i, 0) for i, (name, p) in enumerate(named)
            ]
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat), [
                fragment for name, p in named if (fragment := self._stage_3_fragment(name, p))
            ]
        return list(self.engine.optimizer.single_partition_of_fp32_groups), self._stage_1_fragments(named)

    def _stage_3_fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        group, offset, size = self.engine.optimizer.grad_position[self.engine.optimizer.get_param_id(parameter)]
        shape = full_shape(parameter)
        count = math.prod(shape)
        start, stop = min(self.rank * size, count), min((self.rank + 1) * size, count)
        return Fragment(name, shape, start, stop, group, offset) if stop > start else None

    def _stage_1_fragments(self, named: list[tuple[str, nn.Parameter]]) -> list[Fragment]:
        names = {id(parameter): name for name, parameter in named}
        optimizer, fragments = self.engine.optimizer, []
        for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
            size = int(optimizer.partition_size[group])
            own_start, own_stop = self.rank * size, (self.rank + 1) * size
            for parameter, at in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
                low, high = max(at, own_start), min(at + parameter.numel(), own_stop)
                if low < high:
                    name, shape = names[id(parameter)], tuple(parameter.shape)
                    fragments.append(Fragment(name, shape, low - at, high - at, group, low - own_start))
        return fragments

    def _make_optimizer_state(self) -> None:
        fused = bool(self._optimizer.defaults.get("fused"))
        for master in self.masters:
            self._optimizer.state[master] = {
                "step": torch.zeros((), device=master.device if fused else "cpu"),
                **{moment: torch.zeros_like(master, requires_grad=False) for moment in MOMENTS},
            }

    @torch.no_grad()
    def initialize(self, blueprint: nn.Module, write_weights: Callable[[nn.Module, Gather], object]) -> None:
        """Initialize weights and EMA, exactly and with no communication of the values. Collective.

        Each parameter is briefly materialized in full on the CPU, and this rank's part is copied to the masters.

        Args:
            blueprint: The same model on the meta device.
            write_weights: Writes all its parameters, entering the given context manager around each group of them.
        """
        names = {id(parameter): name for name, parameter in blueprint.named_parameters()}
        targets: dict[str, list[tuple[Fragment, Tensor]]] = {name: [] for name in names.values()}
        for kind in ("weight", "ema"):
            for fragment, view in self.views(kind):
                targets[fragment.name].append((fragment, view))

        @contextmanager
        def gather(parameters: Sequence[nn.Parameter]) -> Iterator[bool]:
            full = [nn.Parameter(torch.empty(parameter.shape)) for parameter in parameters]
            for parameter, real in zip(parameters, full, strict=True):
                torch.utils.swap_tensors(parameter, real)
            yield True
            for parameter in parameters:
                for fragment, view in targets[names[id(parameter)]]:
                    view.copy_(parameter.view(-1)[fragment.start : fragment.stop])
            for parameter, real in zip(parameters, full, strict=True):
                torch.utils.swap_tensors(parameter, real)

        write_weights(blueprint, gather)
        self.push()

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self.masters[0].device

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter of the model."""
        return {name: full_shape(parameter) for name, parameter in self.engine.module.named_parameters()}

    @property
    def optimizer_steps(self) -> int:
        """Applied optimizer steps; skipped steps do not count."""
        return int(self._optimizer.state[self.masters[0]]["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, value: int) -> None:
        for master in self.masters:
            self._optimizer.state[master]["step"].fill_(value)

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def tensors(self, kind: str) -> list[Tensor]:
        """Flat tensors of one kind (``checkpoint.format.KINDS``), in the order of the masters."""
        if kind == "weight":
            return [master.data for master in self.masters]
        return self.ema if kind == "ema" else [self._optimizer.state[master][kind] for master in self.masters]

    def views(self, kind: str) -> Iterator[tuple[Fragment, Tensor]]:
        """Yield every fragment with a writable flat view of its elements."""
        tensors = self.tensors(kind)
        for fragment in self.fragments:
            count = fragment.stop - fragment.start
            yield fragment, tensors[fragment.master].view(-1).narrow(0, fragment.offset, count)

    def saved_range(self, fragment: Fragment) -> tuple[int, int]:
        """The range of a fragment that this rank saves: all of it, or at stage 0 its share."""
        if self.stage:
            return fragment.start, fragment.stop
        return split_evenly(math.prod(fragment.shape), self.rank, self.world_size)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Update the EMA in place: ``ema <- decay * ema + (1 - decay) * weight``."""
        if self.ema:
            torch._foreach_lerp_(self.ema, [master.detach() for master in self.masters], 1.0 - decay)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Use the EMA weights inside the block. Collective, so the weights are not restored after an error."""
        self.swap_ema()
        yield
        self.swap_ema()

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Swap weights and EMA bit-exactly; call again to restore them. Collective."""
        for master, average in zip(self.masters, self.ema, strict=True):
            kept = master.data.clone()
            master.data.copy_(average)
            average.copy_(kept)
        self.push()

    @torch.no_grad()
    def push(self) -> None:
        """Copy the masters to the weights that the model computes with. Collective."""
        optimizer = self.engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer.checkpoint_event_prologue()  # drops the gathered weights, which are now stale
            for group in range(len(self.masters)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()
