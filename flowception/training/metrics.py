"""What a run says about itself: ``metrics.jsonl``, the console, and Weights & Biases when asked for."""

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
    """What is reported and how often."""

    every_steps: int = 10
    """Steps between console lines. ``metrics.jsonl`` has every step."""
    peak_tflops: float | None = None
    """TFLOP/s that one GPU could do at most, which MFU refers to; None takes it from a table by the GPU's name
    (``training/hardware.py``). Without a known peak there is no MFU."""
    wandb_project: str | None = None
    """Weights & Biases project; None is off. Where wandb finds no API key the run is logged offline."""
    wandb_offline: bool = False
    """Log to files in the run directory without asking the network, even where there is an API key."""
    wandb_name: str | None = None
    """Name of the run there; None takes the run directory's name."""

    def __post_init__(self) -> None:
        peak = number(above=0).or_null("the known peak of the GPU")
        check_ranges("logging", self, {"every_steps": integer(at_least=1), "peak_tflops": peak})


class MetricsLog:
    """Writes the metrics of a run; used by rank 0 only."""

    def __init__(self, run_dir: str | Path, config: LoggingConfig, max_steps: int, first_step: int) -> None:
        """Open the log and cut off what was written after the step that the run resumes from.

        Args:
            run_dir: The run.
            config: What to report.
            max_steps: Steps of the run.
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
        """Write one step's metrics; a console line every ``every_steps`` and at the last step.

        Numbers that are not finite become null, which JSON can hold. A full disk costs lines of ``metrics.jsonl`` and
        is warned of once; the run goes on.
        """
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(json.dumps(known) + "\n")
        step = metrics["step"]
        if step % self._config.every_steps == 0 or step == self._max_steps:
            logger.info("%s", console_line(known, self._max_steps))
        if self._wandb is not None:
            self._to_wandb(lambda: self._wandb.log(known))

    def show(self, name: str, picture: Path, step: int) -> None:
        """Send a picture to Weights & Biases, if the run is there, beside the step's metrics."""
        if self._wandb is not None:
            wandb = require("wandb", extra="wandb")
            self._to_wandb(lambda: self._wandb.log({name: wandb.Image(str(picture)), "step": step}))

    def _to_wandb(self, call: Callable[[], Any]) -> Any:
        """What ``call`` asks of wandb; whatever goes wrong there ends the logging there and not the run.

        Its service is a process of its own, which a cluster's signals reach too.
        """
        try:
            return call()
        except Exception as error:
            logger.warning("wandb failed (%s); the run continues without it, see metrics.jsonl", error)
            self._wandb = None
            return None

    def rewind(self, last_step: int) -> None:
        """Cut off the lines after a step that the run went back to. Weights & Biases draws these steps twice.

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
        """Finish."""
        with suppress(OSError):
            self._stream.close()
        if self._wandb is not None:
            self._to_wandb(self._wandb.finish)


def _truncate(path: Path, last_step: int) -> None:
    """Keep the lines of steps up to ``last_step``; a line cut short by a kill goes too."""
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
    """Refuse a configuration whose packages are missing, before anything is built.

    Raises:
        MissingDependencyError: If wandb is asked for and cannot be imported.
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
    # Not wandb's own counter, which passes over a step that a resumed or rolled back run does again.
    run.define_metric("*", step_metric="step")
    return run


def _has_api_key(wandb: Any) -> bool:
    """Whether wandb would log in without asking: by environment, settings or netrc."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


def _wandb_id(run_dir: Path) -> str:
    """The run's id there: random, so that runs of one name are two, and kept, so that resuming goes on with it."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text().strip()


class Speed:
    """Times the steps of an epoch; the time left is what the last hundred or so predict."""

    _MEMORY = 0.98

    def __init__(self, world_size: int, peak_tflops: float | None) -> None:
        """Begin the first step now.

        Args:
            world_size: Ranks that share a step's FLOPs.
            peak_tflops: What one of them could do at most; None where it is not known.
        """
        self._world_size, self._peak_tflops = world_size, peak_tflops
        self._began = time.perf_counter()
        self._usual_s: float | None = None

    def lap_s(self) -> float:
        """Seconds since the step before ended."""
        return time.perf_counter() - self._began

    def restart(self) -> None:
        """Begin the next step now: what came since the last one, validation or saving, was no step."""
        self._began = time.perf_counter()

    def end_step(self, clips: int, tokens: int, flops: float, steps_left: int) -> dict[str, float]:
        """End a step and begin the next.

        Args:
            clips: Clips of the step.
            tokens: Visible tokens of the step.
            flops: FLOPs of its forward and backward passes, over all ranks.
            steps_left: Steps to the end of the run.

        Returns:
            ``step_s``, ``clips_per_s``, ``tokens_per_s``, ``tflops_per_s`` of one rank and ``time_left_s``; where the
            peak is known ``mfu`` and ``peak_tflops``.
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
    """One line for a person."""
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
    """Seconds as 45s, 3m05s, 2h07m or 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
