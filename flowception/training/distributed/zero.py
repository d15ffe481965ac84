"""DeepSpeed: configuration, engine construction, backward pass and optimizer step.

Only this module imports DeepSpeed (the doctor and the dry run merely check that it is installed). Only this module and
``sharded_state``, which finds the masters inside the ZeRO optimizers, depend on DeepSpeed internals, so a new DeepSpeed
version can break only these two. All other code treats an engine as a module to call, with ``train``, ``eval`` and,
between micro-steps, ``step``. This module uses these private parts of DeepSpeed: the list ``FWD_MODULE_STACK``, the
optimizers' ``_get_norm_groups`` and ``scaled_global_norm``, ``combine_grad_norm_groups``, ``__compatible_ops__``, and
``ds_shape`` of a partitioned weight.

ZeRO stage 0 replicates everything, 1 shards the optimizer state, 2 also the gradients, 3 also the weights. Master
weights are always float32, and gradients are always accumulated and reduced in float32. With ``precision: bf16``

* stages 2 and 3 compute with bfloat16 copies of the weights, which take half the memory and half the gather traffic;
* stages 0 and 1 compute with float32 weights under ``torch_autocast``, because DeepSpeed's bfloat16 optimizers for
  these stages store their state in a different layout.

DeepSpeed creates its masters from the weights it receives, which are bfloat16 by then. So initial weights are written
to the masters afterwards (``ShardedState.initialize``), exactly, at any stage.
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
    """DeepSpeed ZeRO sharding of the training state."""

    stage: int = 3
    """What is sharded: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    param_persistence_threshold: int = 10_000
    """Stage 3: weights with fewer elements stay gathered on every rank; 0 shards all weights."""
    bucket_elements: int = 50_000_000
    """Elements per bucket for reductions and gathers."""
    max_live_elements: int = 1_000_000_000
    """Stage 3: maximum elements of gathered weights held at once."""
    overlap_communication: bool = True
    """Reduce gradients during the backward pass (ignored on CPUs)."""
    hierarchical_partition_size: int | None = None
    """Stage 3: ranks per group, usually the GPUs of a node. Each group keeps a second sharded copy of the weights, so
    that weights are gathered within the group after the first forward pass of a step (ZeRO++ hpZ). None is off."""

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
        """Check that the ranks divide into groups.

        Raises:
            ConfigError: If they do not.
        """
        group = self.hierarchical_partition_size
        if group is not None and world_size % group:
            raise ConfigError(
                f"zero.hierarchical_partition_size must divide the number of ranks, or be null for off, got {group} "
                f"and {world_size} ranks"
            )


class StepOutcome(NamedTuple):
    """Result of an optimizer step."""

    grad_norm: float
    """Global gradient norm before clipping."""
    refused: str | None
    """Why the step was skipped; None if it was applied."""

    @property
    def applied(self) -> bool:
        """Whether the weights were updated."""
        return self.refused is None


def init_deepspeed(backend: str) -> None:
    """Initialize the process group from the variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        backend: ``gloo`` or ``nccl``.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    if backend == "gloo":
        # Otherwise DeepSpeed spends a minute compiling a shared-memory all-reduce that only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)


def deepspeed_config(
    zero: ZeroConfig, precision: Precision, accumulation_steps: int, clip_grad_norm: float | None, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's JSON configuration.

    Args:
        zero: Sharding.
        precision: Precision of the forward and backward pass.
        accumulation_steps: Micro-steps per optimizer step.
        clip_grad_norm: Maximum gradient norm; None is off. At stage 0 ``optimizer_step`` clips instead.
        device: Device of the run.

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
            # modules listed here would have their gradients reduced in bf16
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": {
            "stage": zero.stage,
            # at stage 3 gradients go directly into bucket buffers; this would add a copy
            "contiguous_gradients": zero.stage < 3,
            "overlap_comm": zero.overlap_communication and device.type == "cuda",
            "reduce_bucket_size": zero.bucket_elements,
            "allgather_bucket_size": zero.bucket_elements,
            "stage3_prefetch_bucket_size": zero.bucket_elements,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_elements,
            "stage3_max_reuse_distance": zero.max_live_elements,
            "zero_hpz_partition_size": zero.hierarchical_partition_size or 1,
            # gathered as one module with hooks outside it, so it can be compiled and the host runs fewer hooks
            "leaf_module": {"classes": [f"{Block.__module__}.{Block.__qualname__}"]},
        },
        # it synchronizes the device twice per micro-step, which would leave the GPU idle
        "timers": {"throughput": {"enabled": False}},
    }


def build_engine(
    build_model: Callable[[], nn.Module],
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    config: dict[str, Any],
    device: torch.device,
) -> Any:
    """Build the model and the DeepSpeed engine. The weights are undefined until ``ShardedState`` sets them.

    Args:
        build_model: Builds the module; at stage 3 its weights are partitioned as they are created.
        build_optimizer: Builds the optimizer of the model.
        config: From ``deepspeed_config``.
        device: Device of the run; the weights are created there, in float32 at first.

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
    """Full shape of a parameter, even if ZeRO-3 has partitioned it and this rank has a flat part of it or nothing."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def backward(engine: Any, loss: Tensor) -> None:
    """Run the backward pass of a micro-step. Collective.

    At stage 3 DeepSpeed keeps a list of the modules being executed. The recomputation of a checkpointed block stops
    early and never removes its entry, so the list would grow by one entry per block and micro-step. It is reset here.

    Args:
        engine: From ``build_engine``.
        loss: Loss of the micro-step.
    """
    engine.backward(loss)
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        FWD_MODULE_STACK[:] = [engine.module]


Refuse = Callable[[float], str | None]
"""Maps a gradient norm to the reason to skip the step; None to apply it."""


def optimizer_step(engine: Any, clip_grad_norm: float | None, refuse: Refuse, device: torch.device) -> StepOutcome:
    """Apply the optimizer step after the backward pass of the last micro-step, unless it is skipped. Collective.

    A skipped step changes neither weights nor moments, and drops its gradients. A step whose gradient is not finite is
    skipped without calling ``refuse``. The norm is bit-identical on all ranks before ``refuse`` sees it, so that they
    decide alike.

    Args:
        engine: From ``build_engine``.
        clip_grad_norm: Maximum gradient norm; None is off.
        refuse: Called on all ranks or on none.
        device: Device of the run.

    Returns:
        The gradient norm, and why the step was skipped.
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
    """Pass the norm that a ZeRO optimizer computes to ``judge``, and replace it with infinity if the step is skipped.

    With an infinite norm DeepSpeed skips the step and drops the gradients, on its code path for fp16 overflows. Stages
    1 and 2 may find gradients that are not finite before computing the norm, on all ranks together; then ``judge`` is
    not called.
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
