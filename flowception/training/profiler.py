"""Profile a few steps with ``torch.profiler``.

For each chosen rank, ``RUN/profile/rank_00000_step_00000015.json`` is a trace for https://ui.perfetto.dev or
``chrome://tracing``, and the ``.txt`` file beside it is a table of the slowest operators. Steps are counted from the
start of the job, so a resumed run is profiled again. Profiled steps are slower, but the run's results are the same.
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
"""Rows of the operator table."""


@dataclass(kw_only=True)
class ProfileConfig:
    """Profiler trace of a few steps."""

    active_steps: int | None = None
    """Steps to record; None is off."""
    wait_steps: int = 10
    """Steps of the job to skip first, while caches fill and kernels are selected."""
    warmup_steps: int = 2
    """Steps after those that are traced and discarded, because the first steps of a trace are slow."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks to trace."""

    def __post_init__(self) -> None:
        rules = {
            "active_steps": integer(at_least=1).or_null("off"),
            "wait_steps": integer(at_least=0),
            "warmup_steps": integer(at_least=0),
            "ranks": list_of(integer(at_least=0)),
        }
        check_ranges("profile", self, rules)

    def check_world_size(self, world_size: int) -> None:
        """Check that the ranks to trace exist.

        Raises:
            ConfigError: If one does not.
        """
        if self.active_steps is not None and max(self.ranks) >= world_size:
            raise ConfigError(
                f"profile.ranks must be ranks from 0 to {world_size - 1}, got {list(self.ranks)} and {world_size} ranks"
            )


class StepProfiler:
    """Traces steps of this rank if it is in ``ranks``; otherwise does nothing."""

    def __init__(self, config: ProfileConfig, run_dir: str | Path, rank: int) -> None:
        """Start counting steps.

        Args:
            config: Which steps and ranks to trace.
            run_dir: The run directory.
            rank: This rank.
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
            step: Optimizer steps of the run done so far, for the file names.
        """
        if self._profile is None:
            return
        self._step = step
        self._calls += 1
        self._profile.step()
        if self._calls == self._last_call:
            self.close()

    def close(self) -> None:
        """Stop tracing. An unfinished trace is written with the steps recorded so far."""
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
