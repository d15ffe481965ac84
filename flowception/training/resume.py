"""Load the training state of a run. Every rank reads only its own part; nothing is gathered.

``flowception.checkpoint.format`` describes the files, and ``training.checkpointer`` writes them. A rank reads the
ranges that it needs now, regardless of the number of ranks and the ZeRO stage that saved the checkpoint.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from flowception import run_directory
from flowception.checkpoint import reader, writer
from flowception.checkpoint.format import KINDS, Manifest, list_steps
from flowception.errors import CheckpointError
from flowception.ranges import check_ranges, integer, number
from flowception.shards.schema import ShardMeta
from flowception.training.distributed.collectives import (
    Ranks,
    broadcast_object,
    mark_on_all_ranks,
    on_main,
    run_on_all_ranks,
)
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.run_state import RunState

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save checkpoints and how many to keep."""

    save_every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int | None = 3
    """Number of newest checkpoints to keep; None keeps all. The checkpoint of step 0 is never removed."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this are never removed; None is off."""
    save_at_start: bool = True
    """Save step 0, the untrained model: the rollback target until the next checkpoint, and an early test of the
    storage."""
    save_timeout_s: float = 600.0
    """Seconds that rank 0 waits for the other ranks' parts after writing its own, before the save fails. Must be less
    than ``guard.hang_timeout_s``, and than the 30 minutes after which ranks that wait for rank 0 time out."""

    def __post_init__(self) -> None:
        rules = {
            "save_every_steps": integer(at_least=1),
            "keep_last": integer(
                at_least=2, note="if the newest is damaged, a run resumes from the one before"
            ).or_null("all"),
            "keep_every_steps": integer(at_least=1).or_null("off"),
            "save_timeout_s": number(above=0, at_most=1500),
        }
        check_ranges("checkpoint", self, rules)


def no_initial_weights(run_dir: str | Path) -> CheckpointError:
    """The error of an ``init_from`` without a checkpoint, for the run and for the dry run before it."""
    return CheckpointError(f"init_from={run_dir} has no checkpoint; give the directory of a run that has saved one")


def load_newest(run_dir: str | Path, shards: ShardedState) -> RunState | None:
    """Load the newest valid checkpoint of a run. Collective.

    Returns:
        The state of the run; None if it has no checkpoint.

    Raises:
        CheckpointError: If all checkpoints are damaged, or belong to a different model, or a rank cannot read its part.
    """
    folder = find_latest(run_dir, shards)
    return None if folder is None else RunState.from_json(load(folder, shards).state)


def set_aside_newer(run_dir: str | Path, step: int, ranks: Ranks) -> None:
    """Rename checkpoints newer than the one that a run continues from. They are damaged, but are not deleted."""
    if not ranks.is_main:
        return
    try:
        for folder in writer.set_aside(run_dir, newer_than=step):
            logger.info("renamed a damaged checkpoint to %s; delete it if you do not need it", folder)
    except OSError as error:
        logger.warning("cannot rename the damaged checkpoints after step %d (%s)", step, error)


def load(folder: str | Path, shards: ShardedState) -> Manifest:
    """Load a checkpoint into master weights, moments, EMA and model. Collective.

    Returns:
        The manifest, with the state of the run.

    Raises:
        CheckpointError: If it belongs to a different model, or a rank cannot read it.
    """
    manifest = run_on_all_ranks(lambda: _read(folder, shards, {kind: kind for kind in KINDS}))
    shards.optimizer_steps = int(manifest.state["optimizer_steps"])
    shards.push()
    return manifest


def load_initial_weights(run_dir: str | Path, shards: ShardedState, meta: ShardMeta, ranks: Ranks) -> None:
    """Initialize weights and EMA from the newest EMA of another run. Collective.

    Args:
        run_dir: The other run.
        shards: Training state to fill.
        meta: Metadata of the shard set to train on.
        ranks: This rank.

    Raises:
        CheckpointError: If the other run has no checkpoint, or a different model.
        RunDirectoryError: If it was trained on latents of a different codec.
    """
    folder = find_latest(run_dir, shards)
    if folder is None:
        raise mark_on_all_ranks(no_initial_weights(run_dir))
    on_main(ranks, lambda: run_directory.check_codec(run_dir, meta, new_is_fine=False))
    run_on_all_ranks(lambda: _read(folder, shards, {"weight": "ema", "ema": "ema"}))
    shards.push()
    logger.info("starting from the EMA weights of %s", folder)


@torch.no_grad()
def _read(folder: str | Path, shards: ShardedState, sources: dict[str, str]) -> Manifest:
    """Fill this rank's tensors of each kind in ``sources`` from the kind in the checkpoint that it maps to."""
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
                f"{folder} is a checkpoint of a different model: {name} has shape {saved.get(name)} there and "
                f"{ours.get(name)} here; use the model configuration that it was trained with"
            )


def find_latest(run_dir: str | Path, shards: ShardedState, up_to: int | None = None) -> Path | None:
    """Find the newest valid checkpoint of a run; the ranks share the verification. Collective.

    Args:
        run_dir: The run directory.
        shards: For the rank and the world size.
        up_to: Latest acceptable step; None for any.

    Returns:
        Its folder; None if there are no checkpoints.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged.
    """
    found = broadcast_object(run_on_all_ranks(lambda: list_steps(run_dir)))
    steps = [step for step in found if up_to is None or step <= up_to]
    try:
        return reader.latest_valid(
            run_dir,
            steps=steps,
            check=lambda folder: run_on_all_ranks(lambda: reader.verify(folder, shards.rank, shards.world_size)),
        )
    except CheckpointError as error:
        mark_on_all_ranks(error)
        raise
