"""The configuration of a training run, combined from sections that are dataclasses in the modules that use them.

Process and plan keys are top-level (``insertion_share``, ``token_budget``). All others are nested (``optim.lr``,
``zero.stage``).
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
    """All settings of ``train/main.py``."""

    plan: PlanConfig = field(metadata=FLAT)
    """Step and pack sizes."""
    run_dir: str = MISSING
    """Run directory. The same command with the same directory resumes the run."""
    max_steps: int = MISSING
    """Total optimizer steps."""
    seed: int = 0
    """Seed of all random draws of the run."""
    init_from: str | None = None
    """Run directory whose newest EMA weights initialize this run; None is random initialization."""
    memory_gib: float | None = None
    """Device memory per rank in GiB, for ``model.activation_checkpointing: auto``. None detects it: the memory of the
    smallest GPU or, on CPUs, a rank's share of its machine's memory."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its learning rate schedule."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Exponential moving average of the weights."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """DeepSpeed ZeRO sharding."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save checkpoints and which to keep."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Skipped steps, rollbacks, and the watchdog."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out loss."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Clips sampled during training."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console and Weights & Biases."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profiler trace of a few steps."""

    def __post_init__(self) -> None:
        """Check the ranges of the top-level keys and the consistency of the sections."""
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
