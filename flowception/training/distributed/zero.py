"""DeepSpeed: its configuration, how the engine is built, and its backward pass and optimizer step.

This module alone imports DeepSpeed. It and ``sharded_state``, which finds the masters inside the ZeRO optimizers, alone
know DeepSpeed's inside: these two are what a new version of DeepSpeed can break. To all others an engine is a module to
call, with ``train``, ``eval`` and, between micro-steps, ``step``. Not public in DeepSpeed and used here are the list
``FWD_MODULE_STACK``, the optimizers' ``_get_norm_groups`` and ``scaled_global_norm``, ``__compatible_ops__``, and
``ds_shape`` of a partitioned weight.

ZeRO stage 0 replicates everything, 1 shards the optimizer, 2 also the gradients, 3 also the weights. Master weights are
float32, and gradients accumulate and reduce in float32, always. With ``precision: bf16``

* stages 2 and 3 work on bfloat16 copies of the weights: half the memory and half the gathering;
* stages 0 and 1 work on float32 weights under ``torch_autocast``: DeepSpeed's own bfloat16 optimizers there keep their
  state in other forms.

DeepSpeed makes its masters from the weights it is given, which are bfloat16 by then; so initial weights are written to
the masters afterwards (``ShardedState.initialize``), exactly, at any stage.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flowception.errors import ConfigError
from flowception.nn.dit import Block
from flowception.ranges import check_ranges, integer
from flowception.training.distributed.collectives import all_max

Precision = Literal["bf16", "fp32"]
GRADIENT_NOT_FINITE = "the gradient is not finite"
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(kw_only=True)
class ZeroConfig:
    """How DeepSpeed shards the training state."""

    stage: int = 3
    """0 none, 1 optimizer, 2 and gradients, 3 and weights."""
    param_persistence_threshold: int = 10_000
    """Stage 3: weights with fewer elements stay gathered on every rank. 0 shards everything."""
    bucket_elements: int = 50_000_000
    """Elements of one reduction or gathering bucket."""
    max_live_elements: int = 1_000_000_000
    """Stage 3: gathered weights that may be live at once."""
    overlap_communication: bool = True
    """Reduce gradients while the backward pass goes on (ignored on the CPU)."""
    hierarchical_partition_size: int | None = None
    """Stage 3: ranks of a group, usually the GPUs of a node, that keeps a second copy of the weights among its members,
    so that after a step's first forward pass weights are gathered inside the group (ZeRO++ hpZ). None is off."""

    def __post_init__(self) -> None:
        rules = {
            "stage": integer(at_least=0, at_most=3),
            "param_persistence_threshold": integer(at_least=0),
            "bucket_elements": integer(at_least=1),
            "max_live_elements": integer(at_least=1),
            "hierarchical_partition_size": integer(at_least=2, note="the GPUs of a node").or_null("off"),
        }
        check_ranges("zero", self, rules)
        group = self.hierarchical_partition_size
        if group is not None and self.stage != 3:
            raise ConfigError(
                f"zero.hierarchical_partition_size must be null unless zero.stage is 3, got {group} and {self.stage}"
            )

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of ranks that does not divide into groups.

        Raises:
            ConfigError: Naming both numbers.
        """
        group = self.hierarchical_partition_size
        if group is not None and world_size % group:
            raise ConfigError(
                f"zero.hierarchical_partition_size must divide the number of ranks, or be null for off, got {group} "
                f"and {world_size} ranks"
            )


class StepOutcome(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping."""
    refused: str | None
    """Why the weights were left alone; None where they moved."""

    @property
    def applied(self) -> bool:
        """Whether the weights moved."""
        return self.refused is None


def init_deepspeed(backend: str) -> None:
    """Start the process group from the variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        backend: ``gloo`` or ``nccl``.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    if backend == "gloo":
        # DeepSpeed would compile a shared-memory all-reduce for a minute, which only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)


def deepspeed_config(
    zero: ZeroConfig, precision: Precision, accumulation_steps: int, clip_grad_norm: float | None, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's JSON configuration.

    Args:
        zero: Sharding.
        precision: Type of the forward and backward pass.
        accumulation_steps: Micro-steps of an optimizer step.
        clip_grad_norm: Largest gradient norm; None is off. At stage 0 ``optimizer_step`` clips instead.
        device: Where the run computes.

    Returns:
        The configuration as a dictionary.
    """
    low_precision = precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": (clip_grad_norm or 0.0) if zero.stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": low_precision and zero.stage >= 2, "check_grad_overflow": True},
        "torch_autocast": {
            "enabled": low_precision and zero.stage < 2,
            "dtype": "bfloat16",
            # a module listed here would have its gradients reduced in bf16
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": {
            "stage": zero.stage,
            # at stage 3 gradients go into the buckets' own buffers; this would copy them once more before
            "contiguous_gradients": zero.stage < 3,
            "overlap_comm": zero.overlap_communication and device.type == "cuda",
            "reduce_bucket_size": zero.bucket_elements,
            "allgather_bucket_size": zero.bucket_elements,
            "stage3_prefetch_bucket_size": zero.bucket_elements,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_elements,
            "stage3_max_reuse_distance": zero.max_live_elements,
            "zero_hpz_partition_size": zero.hierarchical_partition_size or 1,
            # gathered as a whole, its hooks outside: so it can be compiled, and the host has fewer hooks to run
            "leaf_module": {"classes": [f"{Block.__module__}.{Block.__qualname__}"]},
        },
        # its two waits for the whole device a micro-step would leave the GPU without work
        "timers": {"throughput": {"enabled": False}},
    }


def build_engine(
    build_model: Callable[[], nn.Module],
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    config: dict[str, Any],
    device: torch.device,
) -> Any:
    """Build the model and hand it to DeepSpeed. Its weights have no meaning before ``ShardedState`` gives them one.

    Args:
        build_model: Makes the module; under stage 3 its weights are partitioned as they are made.
        build_optimizer: Makes the optimizer of the model.
        config: From ``deepspeed_config``.
        device: Where the run computes; the weights are made there, in float32 at first.

    Returns:
        The DeepSpeed engine.
    """
    import deepspeed

    partitioned = config["zero_optimization"]["stage"] == 3
    with deepspeed.zero.Init(config_dict_or_path=config) if partitioned else device:
        model = build_model()
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model), config=config)
    return engine


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO-3 has partitioned it, so that this rank holds a flat part or nothing."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def backward(engine: Any, loss: Tensor) -> None:
    """Run the backward pass of a micro-step. Collective.

    At stage 3 DeepSpeed notes which modules are at work in a list. A checkpointed block's recomputation ends early, and
    its entry is then never taken out: the list would hold one more for every block and micro-step of the run.

    Args:
        engine: From ``build_engine``.
        loss: Of the micro-step.
    """
    engine.backward(loss)
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        FWD_MODULE_STACK[:] = [engine.module]


Refuse = Callable[[float], str | None]
"""Says for a gradient norm why a step must not be taken; None to take it."""


def optimizer_step(engine: Any, clip_grad_norm: float | None, refuse: Refuse, device: torch.device) -> StepOutcome:
    """Take the optimizer step after the last micro-step's backward pass, unless it is refused. Collective.

    A refused step moves neither weights nor moments, and its gradients are dropped. One whose gradient is not finite
    is refused without asking. The norm is made the same to the bit on all ranks before ``refuse`` sees it, so that they
    decide alike.

    Args:
        engine: From ``build_engine``.
        clip_grad_norm: Largest gradient norm; None is off.
        refuse: Asked on all ranks or on none.
        device: Where the run computes.

    Returns:
        The gradient norm, and why the step was refused.
    """
    seen: list[StepOutcome] = []

    def judge(own_norm: float) -> bool:
        norm = all_max(own_norm if math.isfinite(own_norm) else math.inf, device)
        seen.append(StepOutcome(norm, refuse(norm) if math.isfinite(norm) else GRADIENT_NOT_FINITE))
        return seen[0].refused is None

    if engine.zero_optimization_stage():
        with _norm_judged(engine.optimizer, engine.zero_optimization_stage(), judge):
            engine.step()
        outcome = seen[0] if seen else StepOutcome(math.inf, GRADIENT_NOT_FINITE)
        if engine.was_step_applied() != outcome.applied:
            raise RuntimeError(
                f"DeepSpeed reports applied={engine.was_step_applied()} for a step that should be: {outcome}"
            )
        return outcome
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not judge(float(norm)):
        for parameter in parameters:
            parameter.grad = None
    elif clip_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    engine.step()
    return seen[0]


@contextmanager
def _norm_judged(optimizer: Any, stage: int, judge: Callable[[float], bool]) -> Iterator[None]:
    """Inside, the norm that a ZeRO optimizer computes in its step is judged, and infinite where it was refused.

    With an infinite norm DeepSpeed takes no step and drops the gradients, on its own path for fp16's overflows. Stages
    1 and 2 may find gradients that are not finite before the norm, all ranks together; then nothing is judged.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    compute = getattr(optimizer, name)

    def judged(*arguments: Any, **options: Any) -> Any:
        found = compute(*arguments, **options)
        total = combine_grad_norm_groups(found) if stage == 3 else found
        if judge(float(total)):
            return found
        infinite = torch.full_like(total, math.inf)
        return [infinite] if stage == 3 else infinite

    setattr(optimizer, name, judged)
    try:
        yield
    finally:
        delattr(optimizer, name)
