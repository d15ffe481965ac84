"""A training run's whole configuration. Every section is a dataclass beside its owner; this module composes them.

The keys of the process and of the plan are top-level (``insertion_share``, ``token_budget``), all others are nested
(``optim.lr``, ``zero.stage``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from flowception.config import FLAT, load
from flowception.data.step_plan import PlanConfig
from flowception.errors import ConfigError
from flowception.ranges import check_ranges, integer, number
from flowception.rng import MAX_SEED
from flowception.run_directory import RunConfig
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
class TrainConfig(RunConfig):
    """Everything that ``train/main.py`` reads."""

    plan: PlanConfig = field(metadata=FLAT)
    """Sizes of steps and packs."""
    run_dir: str = MISSING
    """Folder of the run. The same command with the same folder resumes."""
    max_steps: int = MISSING
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Decides every draw of the run."""
    init_from: str | None = None
    """Run directory whose newest EMA weights this run starts from; None for a fresh start."""
    memory_gib: float | None = None
    """Memory of one rank's device in GiB, which ``model.activation_checkpointing: auto`` goes by. None asks them: it is
    that of the smallest GPU or, on CPUs, a rank's part of its machine's memory."""
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
        """Check the ranges of this class's own keys, and sections against each other."""
        rules = {
            "seed": integer(at_least=0, at_most=MAX_SEED),
            "max_steps": integer(at_least=1),
            "memory_gib": number(above=0).or_null("the memory of the devices"),
        }
        check_ranges("", self, rules)
        save_s, hang_s = self.checkpoint.save_timeout_s, self.guard.hang_timeout_s
        if hang_s is not None and save_s >= hang_s:
            raise ConfigError(
                f"checkpoint.save_timeout_s must be less than guard.hang_timeout_s, got {save_s:g} and {hang_s:g}: "
                "the watchdog would treat a save that waits for a slow rank as a hang"
            )


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training run's configuration; see ``load``."""
    return load(TrainConfig, paths, overrides)
