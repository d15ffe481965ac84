"""Compiled blocks beside eager ones, of the same network on the same pack: a part of ``benchmarks/packing.py``."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from flowception.nn import FlowceptionDiT

MIN_SPEEDUP = 1.25
"""How many times as fast compiled blocks should be."""


def why_not() -> str | None:
    """Why blocks cannot be compiled here; None if they can."""
    if shutil.which("g++") or shutil.which("clang++"):
        return None
    return "no C++ compiler (g++ or clang++) is on the PATH"


def speedup(model: FlowceptionDiT, run: Callable[[FlowceptionDiT], tuple[float, float]], repeats: int) -> float:
    """How many times as fast a step is with compiled blocks: ratio of the medians of interleaved repeats.

    Args:
        model: With eager blocks.
        run: A step of a network: seconds and the loss.
        repeats: Of each; what compiling takes is not counted.

    Returns:
        Seconds of the eager step over those of the compiled one.

    Raises:
        SystemExit: If their losses differ.
    """
    torch._dynamo.reset()  # or a second pack's other shape would make sizes symbols, which a training run has not
    compiled = FlowceptionDiT(replace(model.config, compile="blocks"))
    compiled.load_state_dict(model.state_dict())
    losses = run(model)[1], run(compiled)[1]
    if abs(losses[0] - losses[1]) > 1e-5 * abs(losses[0]):
        raise SystemExit(f"eager and compiled blocks must have the same loss, they have {losses}")
    seconds = [[run(network)[0] for network in (model, compiled)] for _ in range(repeats)]
    eager_s, compiled_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return eager_s / compiled_s
