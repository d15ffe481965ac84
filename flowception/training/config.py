"""A training run's whole configuration. Every section is a dataclass beside its owner; this module composes them.

The keys of the process and of the plan are top-level (``insertion_share``, ``token_budget``), all others are nested
(``optim.lr``, ``zero.stage``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from flowception.config import load
from flowception.data.step_plan import PlanConfig
from flowception.errors import ConfigError
from flowception.flow.extended_time import ProcessConfig
from flowception.nn.presets import DiTConfig
from flowception.ranges import check_ranges, integer, number
from flowception.rng import MAX_SEED
from flowception.shards.open import DataConfig
from flowception.training.distributed.zero import ZeroConfig
from flowception.training.ema import EmaConfig
from flowception.training.guard import GuardConfig
from flowception.training.metrics import LoggingConfig
from flowception.training.optim import OptimConfig
from flowception.training.profiler import ProfileConfig
from flowception.training.resume import CheckpointConfig
from flowception.training.samples import SamplesConfig
from flowception.training.validation import ValidationConfig


@dataclass(kw_only=True)
class TrainConfig(ProcessConfig, PlanConfig):
    """Everything that ``train/main.py`` reads. The process's and the plan's own fields come first."""

    run_dir: str = MISSING
    """Folder of the run. The same command with the same folder resumes."""
    max_steps: int = MISSING
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Decides every draw of the run."""
    init_from: str | None = None
    """Run directory whose newest EMA weights this run starts from; None for a fresh start."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the forward and backward pass. Master weights and optimizer are always fp32."""
    memory_gib: float | None = None
    """Memory of one rank's device in GiB, which ``model.activation_checkpointing: auto`` goes by. None asks them: it is
    that of the smallest GPU or, on CPUs, a rank's part of its machine's memory."""
    data: DataConfig
    """The shard set and how it is read."""
    model: DiTConfig = field(default_factory=DiTConfig)
    """The network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its schedule."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Exponential moving average of the weights."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """DeepSpeed's sharding."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save and what to keep."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Steps that are refused, going back, and the watchdog."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out loss."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Clips sampled during training."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console and wandb."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """A trace of a few steps."""

    def __post_init__(self) -> None:
        """Check the mixins' ranges and this class's own."""
        ProcessConfig.__post_init__(self)
        PlanConfig.__post_init__(self)
        rules = {
            "seed": integer(at_least=0, at_most=MAX_SEED),
            "max_steps": integer(at_least=1),
            "memory_gib": number(above=0).or_null("what the devices have"),
        }
        check_ranges("", self, rules)
        save_s, hang_s = self.checkpoint.save_timeout_s, self.guard.hang_timeout_s
        if hang_s is not None and save_s >= hang_s:
            raise ConfigError(
                f"checkpoint.save_timeout_s must be less than guard.hang_timeout_s, got {save_s:g} and {hang_s:g}: a "
                "save that still waits for a slow rank would be taken for a hang"
            )


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training run's configuration; see ``load``."""
    return load(TrainConfig, paths, overrides)
