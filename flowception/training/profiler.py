"""A few steps under ``torch.profiler``: where the time of a step goes.

Of each chosen rank ``RUN/profile/rank_00000_step_00000015.json`` is a trace for https://ui.perfetto.dev or
``chrome://tracing``, and the ``.txt`` beside it a table of the operators that took longest. Steps are counted from the
start of the job, so a resumed run is profiled again. Everything else of the run stays as it is, but profiled steps are
slower.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from flowception.errors import ConfigError
from flowception.progress import EVERY_RANK
from flowception.ranges import check_ranges, integer, list_of

logger = logging.getLogger(__name__)

_ROWS = 40
"""Operators in the table."""


@dataclass(kw_only=True)
class ProfileConfig:
    """A trace of a few steps."""

    active_steps: int | None = None
    """Steps to record; None is off."""
    wait_steps: int = 10
    """Steps of the job before, in which caches fill and kernels are chosen."""
    warmup_steps: int = 2
    """Steps after these that are traced and thrown away, as the first ones of a trace are slow."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are traced."""

    def __post_init__(self) -> None:
        rules = {
            "active_steps": integer(at_least=1).or_null("off"),
            "wait_steps": integer(at_least=0),
            "warmup_steps": integer(at_least=0),
            "ranks": list_of(integer(at_least=0)),
        }
        check_ranges("profile", self, rules)

    def check_world_size(self, world_size: int) -> None:
        """Refuse a rank that there is not.

        Raises:
            ConfigError: Naming it.
        """
        if self.active_steps is not None and max(self.ranks) >= world_size:
            raise ConfigError(
                f"profile.ranks must be ranks from 0 to {world_size - 1}, got {list(self.ranks)} and {world_size} ranks"
            )


class StepProfiler:
    """Traces this rank's steps, if it is one of the chosen; else does nothing."""

    def __init__(self, config: ProfileConfig, run_dir: str | Path, rank: int) -> None:
        """Begin to count steps.

        Args:
            config: Which steps and ranks.
            run_dir: The run.
            rank: This one.
        """
        self._folder, self._rank, self._step = Path(run_dir) / "profile", rank, 0
        self._profile: torch.profiler.profile | None = None
        if config.active_steps is None or rank not in config.ranks:
            return
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._last_call = config.wait_steps + config.warmup_steps + config.active_steps
        self._calls = 0
        self._profile = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=torch.profiler.schedule(
                wait=config.wait_steps, warmup=config.warmup_steps, active=config.active_steps, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def end_step(self, step: int) -> None:
        """Count a step of the job.

        Args:
            step: Optimizer steps of the run done by now, for the files' names.
        """
        if self._profile is None:
            return
        self._step = step
        self._calls += 1
        self._profile.step()
        if self._calls == self._last_call:
            self.close()

    def close(self) -> None:
        """Stop tracing; a trace that was being recorded is written as far as it goes."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, profile: torch.profiler.profile) -> None:
        path = self._folder / f"rank_{self._rank:05d}_step_{self._step:08d}.json"
        table = profile.key_averages().table(sort_by=self._longest(), row_limit=_ROWS)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
            path.with_suffix(".txt").write_text(table + "\n")
        except (OSError, RuntimeError) as error:
            logger.warning("cannot write the profile %s (%s); training continues", path, error, extra=EVERY_RANK)
        else:
            logger.info(
                "profile of rank %d: %s, slowest operators in %s.txt",
                self._rank,
                path,
                path.stem,
                extra=EVERY_RANK,
            )

    @staticmethod
    def _longest() -> str:
        return "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
