"""Resumes that are wrong on purpose. The benchmark must detect them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any


def _after_load(spoil: Callable[[Any], None]) -> Callable[[], None]:
    """A sabotage that corrupts a rank's state after every load."""

    def install() -> None:
        from flowception.training import resume

        load = resume.load

        def load_and_spoil(folder: Any, shards: Any) -> Any:
            manifest = load(folder, shards)
            spoil(shards)
            return manifest

        resume.load = load_and_spoil

    return install


def _zero_moments(shards: Any) -> None:
    for kind in ("exp_avg", "exp_avg_sq"):
        for tensor in shards.tensors(kind):
            tensor.zero_()


def _ema_from_weights(shards: Any) -> None:
    for average, weight in zip(shards.tensors("ema"), shards.tensors("weight"), strict=True):
        average.copy_(weight)


def _skip_a_step() -> None:
    """Resume one step too far in the data."""
    from flowception.training.run_state import RunState

    read = RunState.from_json

    def read_and_skip(found: dict[str, Any]) -> RunState:
        state = read(found)
        state.cursor = replace(state.cursor, step=state.cursor.step + 1)
        return state

    RunState.from_json = read_and_skip  # type: ignore[method-assign]


def _trust_the_newest() -> None:
    """Load checkpoints without verifying them."""
    from flowception.checkpoint import reader

    reader.verify = lambda folder, *_: reader.read_manifest(folder)


SABOTAGES: dict[str, Callable[[], None]] = {
    "moments": _after_load(_zero_moments),
    "ema": _after_load(_ema_from_weights),
    "cursor": _skip_a_step,
    "verify": _trust_the_newest,
}
"""By name: zeros for the optimizer's moments, the weights for the EMA, data one step ahead, no hashes checked."""
