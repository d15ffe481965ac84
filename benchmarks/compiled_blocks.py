"""Compare compiled with eager blocks of the same network on the same pack, for ``benchmarks/packing.py``."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from flowception.nn import FlowceptionDiT

MIN_SPEEDUP = 1.25
"""Expected minimum speedup of compiled blocks."""


def why_not() -> str | None:
    """Reason why blocks cannot be compiled here; None if they can."""
    if shutil.which("g++") or shutil.which("clang++"):
        return None
    return "no C++ compiler (g++ or clang++) is on the PATH"


def speedup(model: FlowceptionDiT, run: Callable[[FlowceptionDiT], tuple[float, float]], repeats: int) -> float:
    """Measure the speedup of a step with compiled blocks, from medians of interleaved repeats.

    Args:
        model: Network with eager blocks.
        run: Runs a step of a network and returns its seconds and loss.
        repeats: Repeats of each network; compile time is not counted.

    Returns:
        Time of the eager step divided by that of the compiled one.

    Raises:
        SystemExit: If their losses differ.
    """
    torch._dynamo.reset()  # otherwise a second pack shape would make sizes symbolic, unlike in training
    compiled = FlowceptionDiT(replace(model.config, compile="blocks"))
    compiled.load_state_dict(model.state_dict())
    losses = run(model)[1], run(compiled)[1]
    if abs(losses[0] - losses[1]) > 1e-5 * abs(losses[0]):
        raise SystemExit(f"eager and compiled blocks must have the same loss, got {losses}")
    seconds = [[run(network)[0] for network in (model, compiled)] for _ in range(repeats)]
    eager_s, compiled_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return eager_s / compiled_s
