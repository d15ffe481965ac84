"""Loads a run's training state: every rank its own part, nothing gathered.

The files are described in ``flowception.checkpoint.format``; ``training.checkpointer`` writes them. Loading reads the
ranges that a rank now needs, whatever ranks and ZeRO stage the checkpoint was saved by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flowception.checkpoint import reader
from flowception.checkpoint.format import KINDS, Manifest, list_steps
from flowception.errors import CheckpointError
from flowception.ranges import check_ranges, integer, number
from flowception.training.distributed.collectives import broadcast_object, mark_on_all_ranks, run_on_all_ranks
from flowception.training.distributed.sharded_state import ShardedState


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and how many are kept."""

    save_every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int | None = 3
    """Newest checkpoints kept; None keeps all. The one of step 0 is never removed."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this are never removed; None is off."""
    save_at_start: bool = True
    """Save step 0, the untrained model: a rollback before the first checkpoint goes there, and the storage is tried."""
    save_timeout_s: float = 600.0
    """Seconds that rank 0, when its own part is written, waits for the other ranks' parts; then the save has failed.
    Below ``guard.hang_timeout_s``, and below the half hour after which ranks that wait for rank 0 give up."""

    def __post_init__(self) -> None:
        rules = {
            "save_every_steps": integer(at_least=1),
            "keep_last": integer(at_least=2, note="a damaged one needs one before it").or_null("all"),
            "keep_every_steps": integer(at_least=1).or_null("off"),
            "save_timeout_s": number(above=0, at_most=1500),
        }
        check_ranges("checkpoint", self, rules)


def load(folder: str | Path, shards: ShardedState) -> Manifest:
    """Load a checkpoint into the masters, moments, EMA and model. Collective.

    Returns:
        Its manifest, with the run's state.

    Raises:
        CheckpointError: If it belongs to another model, or a rank cannot read it.
    """
    manifest = run_on_all_ranks(lambda: _read(folder, shards, {kind: kind for kind in KINDS}))
    shards.optimizer_steps = int(manifest.state["optimizer_steps"])
    shards.push()
    return manifest


def load_initial_weights(folder: str | Path, shards: ShardedState) -> None:
    """Start weights and EMA from another run's EMA. Collective."""
    run_on_all_ranks(lambda: _read(folder, shards, {"weight": "ema", "ema": "ema"}))
    shards.push()


@torch.no_grad()
def _read(folder: str | Path, shards: ShardedState, sources: dict[str, str]) -> Manifest:
    """Fill this rank's tensors of each kind in ``sources`` with those of the kind it names there."""
    slices = reader.SliceReader(folder)
    _check_same_model(slices.manifest, shards, folder)
    for kind, source in sources.items():
        for fragment, view in shards.views(kind):
            view.copy_(slices.read(source, fragment.name, fragment.start, fragment.stop))
    return slices.manifest


def _check_same_model(manifest: Manifest, shards: ShardedState, folder: str | Path) -> None:
    saved = {name: parameter.shape for name, parameter in manifest.parameters.items()}
    ours = shards.parameter_shapes
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            raise CheckpointError(
                f"{folder} belongs to another model: {name} has shape {saved.get(name)} there and {ours.get(name)} "
                "here; use the model configuration it was trained with"
            )


def find_latest(
    run_dir: str | Path, shards: ShardedState, report: Callable[[str], None], up_to: int | None = None
) -> Path | None:
    """The newest whole checkpoint of a run; the ranks share the reading. Collective.

    Args:
        run_dir: The run.
        shards: For rank, world size and device.
        report: Called on rank 0 with a line for each damaged checkpoint that is passed over.
        up_to: The latest step that is wanted; None for any.

    Returns:
        Its folder, or None if there is none at all.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged.
    """
    found = broadcast_object(run_on_all_ranks(lambda: list_steps(run_dir)))
    steps = [step for step in found if up_to is None or step <= up_to]
    try:
        return reader.latest_valid(
            run_dir,
            report if shards.rank == 0 else None,
            steps=steps,
            check=lambda folder: run_on_all_ranks(lambda: reader.verify(folder, shards.rank, shards.world_size)),
        )
    except CheckpointError as error:
        mark_on_all_ranks(error)
        raise
