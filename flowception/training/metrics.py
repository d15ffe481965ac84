"""Metrics of a run: ``metrics.jsonl``, console lines, and optionally Weights & Biases."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowception.errors import RunDirectoryError, require
from flowception.files import write_atomically
from flowception.ranges import check_ranges, integer, number

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LoggingConfig:
    """What to log and how often."""

    every_steps: int = 10
    """Steps between console lines. ``metrics.jsonl`` has a line for every step."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one GPU, which MFU is relative to; None looks it up by the GPU's name (``training/hardware.py``).
    Without a known peak, MFU is not logged."""
    wandb_project: str | None = None
    """Weights & Biases project; None is off. Without an API key the run is logged offline."""
    wandb_offline: bool = False
    """Log to files in the run directory without network access, even with an API key."""
    wandb_name: str | None = None
    """Name of the run in Weights & Biases; None is the name of the run directory."""

    def __post_init__(self) -> None:
        peak = number(above=0).or_null("the known peak of the GPU")
        check_ranges("logging", self, {"every_steps": integer(at_least=1), "peak_tflops": peak})


class MetricsLog:
    """Writes the metrics of a run, on rank 0 only."""

    def __init__(self, run_dir: str | Path, config: LoggingConfig, max_steps: int, first_step: int) -> None:
        """Open the log and drop lines after the step that the run resumes from.

        Args:
            run_dir: The run directory.
            config: What to log.
            max_steps: Total steps of the run.
            first_step: Steps done so far.

        Raises:
            RunDirectoryError: If the run directory cannot be written.
        """
        self._config, self._max_steps, self._warned = config, max_steps, False
        path = Path(run_dir) / "metrics.jsonl"
        try:
            _truncate(path, first_step)
            self._stream = path.open("ab", buffering=0)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write to {run_dir} ({error}); free disk space or choose another run_dir"
            ) from error
        self._wandb: Any = None
        if config.wandb_project:
            self._wandb = self._to_wandb(lambda: _start_wandb(config, Path(run_dir)))

    def write(self, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step, with a console line every ``every_steps`` and at the last step.

        Numbers that are not finite become null, because JSON cannot represent them. On a full disk, lines of
        ``metrics.jsonl`` are lost with one warning, and the run continues.
        """
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(json.dumps(known) + "\n")
        step = metrics["step"]
        if step % self._config.every_steps == 0 or step == self._max_steps:
            logger.info("%s", console_line(known, self._max_steps))
        if self._wandb is not None:
            self._to_wandb(lambda: self._wandb.log(known))

    def show(self, name: str, picture: Path, step: int) -> None:
        """Send an image to Weights & Biases, if the run logs there, with the step's metrics."""
        if self._wandb is not None:
            wandb = require("wandb", extra="wandb")
            self._to_wandb(lambda: self._wandb.log({name: wandb.Image(str(picture)), "step": step}))

    def _to_wandb(self, call: Callable[[], Any]) -> Any:
        """Call wandb and return the result. Any error there stops logging to wandb but not the run.

        wandb's service is a separate process, which also receives the signals of the cluster.
        """
        try:
            return call()
        except Exception as error:
            logger.warning("wandb failed (%s); the run continues without it, see metrics.jsonl", error)
            self._wandb = None
            return None

    def rewind(self, last_step: int) -> None:
        """Drop the lines after the step of a rollback. Weights & Biases shows the repeated steps twice.

        Raises:
            RunDirectoryError: If the file cannot be written.
        """
        path = Path(self._stream.name)
        try:
            self._stream.close()
            _truncate(path, last_step)
            self._stream = path.open("ab", buffering=0)
        except OSError as error:
            raise RunDirectoryError(f"cannot write {path} ({error}); free disk space") from error

    def _append(self, line: str) -> None:
        content = line.encode()
        try:
            before_bytes = os.fstat(self._stream.fileno()).st_size
            if self._stream.write(content) < len(content):
                self._stream.truncate(before_bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._warned:
                logger.warning("cannot write metrics.jsonl (%s); steps are missing from it", error)
            self._warned = True

    def close(self) -> None:
        """Close the file and finish the wandb run."""
        with suppress(OSError):
            self._stream.close()
        if self._wandb is not None:
            self._to_wandb(self._wandb.finish)


def _truncate(path: Path, last_step: int) -> None:
    """Keep the lines of steps up to ``last_step``. A line that a kill truncated is dropped too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def check_packages(config: LoggingConfig) -> None:
    """Check that the packages a configuration needs are installed, before anything is built.

    Raises:
        MissingDependencyError: If ``wandb_project`` is set and wandb cannot be imported.
    """
    if config.wandb_project:
        require("wandb", extra="wandb")


def _start_wandb(config: LoggingConfig, run_dir: Path) -> Any:
    wandb = require("wandb", extra="wandb")
    online = not config.wandb_offline and ("WANDB_MODE" in os.environ or _has_api_key(wandb))
    reason = "logging.wandb_offline is set" if config.wandb_offline else "no API key"
    name = config.wandb_name or run_dir.resolve().name
    where = "online" if online else f"offline ({reason})"
    logger.info("wandb: project %s, run %s, %s", config.wandb_project, name, where)
    run = wandb.init(
        project=config.wandb_project,
        name=name,
        id=_wandb_id(run_dir),
        dir=str(run_dir),
        mode=None if online else "offline",
        resume="allow",
    )
    # Not wandb's own step counter, which ignores the repeated steps of a resumed or rolled back run.
    run.define_metric("*", step_metric="step")
    return run


def _has_api_key(wandb: Any) -> bool:
    """Whether wandb can log in without a prompt: from the environment, settings or netrc."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


def _wandb_id(run_dir: Path) -> str:
    """The wandb id of the run: random, so runs with the same name stay apart, and stored, so resuming continues it."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text().strip()


class Speed:
    """Times the steps of an epoch, and predicts the time left from about the last hundred steps."""

    _MEMORY = 0.98

    def __init__(self, world_size: int, peak_tflops: float | None) -> None:
        """Start timing the first step.

        Args:
            world_size: Ranks that share a step's FLOPs.
            peak_tflops: Peak of one rank; None if unknown.
        """
        self._world_size, self._peak_tflops = world_size, peak_tflops
        self._began = time.perf_counter()
        self._usual_s: float | None = None

    def lap_s(self) -> float:
        """Seconds since the previous step ended."""
        return time.perf_counter() - self._began

    def restart(self) -> None:
        """Start timing the next step now, to exclude validation, samples and saving since the last step."""
        self._began = time.perf_counter()

    def end_step(self, clips: int, tokens: int, flops: float, steps_left: int) -> dict[str, float]:
        """End a step and start the next.

        Args:
            clips: Clips of the step.
            tokens: Visible tokens of the step.
            flops: FLOPs of its forward and backward passes, over all ranks.
            steps_left: Remaining steps of the run.

        Returns:
            ``step_s``, ``clips_per_s``, ``tokens_per_s``, ``tflops_per_s`` of one rank and ``time_left_s``; also
            ``mfu`` and ``peak_tflops`` if the peak is known.
        """
        step_s = self.lap_s()
        self._began += step_s
        self._usual_s = step_s if self._usual_s is None else self._usual_s * self._MEMORY + step_s * (1 - self._MEMORY)
        tflops_per_s = flops / step_s / self._world_size / 1e12
        peak = self._peak_tflops
        return {
            "step_s": step_s,
            "clips_per_s": clips / step_s,
            "tokens_per_s": tokens / step_s,
            "tflops_per_s": tflops_per_s,
            "time_left_s": self._usual_s * steps_left,
            **({} if peak is None else {"mfu": tflops_per_s / peak, "peak_tflops": peak}),
        }


def console_line(metrics: Mapping[str, Any], max_steps: int) -> str:
    """Format the metrics of a step as one console line."""
    loss, velocity, insertion = (
        "not finite" if metrics[name] is None else f"{metrics[name]:.4f}"
        for name in ("loss", "loss/velocity", "loss/insertion")
    )
    parts = [
        f"step {metrics['step']}/{max_steps}",
        f"loss {loss} (velocity {velocity}, insertion {insertion})",
        f"{metrics['clips_per_s']:.3g} clips/s",
        f"{metrics['tokens_per_s']:.4g} tokens/s",
        f"fill {metrics['fill']:.3f}",
        f"attention ratio {metrics['attention_ratio']:.3f}",
        f"data wait {metrics['data_wait_s'] / max(metrics['step_s'], 1e-9):.0%}",
        f"{duration(metrics['time_left_s'])} left",
    ]
    if "mfu" in metrics:
        parts.insert(4, f"MFU {metrics['mfu']:.1%}")
    if metrics.get("rate/true"):
        parts.insert(2, f"rate {metrics['rate/predicted'] / metrics['rate/true']:.2f} of true")
    if "validation/loss" in metrics:
        parts.insert(2, f"held-out {metrics['validation/loss']:.4f}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Format seconds as 45s, 3m05s, 2h07m or 3d04h."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"
