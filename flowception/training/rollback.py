"""Roll back to the last good checkpoint within the running job.

A good checkpoint is a valid one saved before the first of the steps skipped in a row. The run loads it, adds the clips
of those steps to the guards' quarantine, which turns them into padding for the rest of the epoch, and immediately
overwrites that checkpoint. After that, a kill loses nothing. A kill before that loses the decision together with the
steps that led to it; the resumed run repeats the steps and decides again. Checkpoints saved during those steps are
removed first, so that no run resumes from them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from flowception.checkpoint import writer
from flowception.errors import CheckpointError, GuardError
from flowception.training import resume
from flowception.training.distributed.collectives import Ranks, mark_on_all_ranks, on_main
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.guard import Guard, GuardConfig
from flowception.training.run_state import RunState

logger = logging.getLogger(__name__)


def roll_back(
    config: GuardConfig,
    run_dir: str | Path,
    guard: Guard,
    shards: ShardedState,
    state: RunState,
    ranks: Ranks,
) -> RunState:
    """Load the last checkpoint before the skipped steps. Collective; no save may be in progress.

    Args:
        config: How often a run may roll back.
        run_dir: The run directory.
        guard: Owner of the journal.
        shards: Training state to fill from the checkpoint.
        state: State of the run.
        ranks: This rank.

    Returns:
        The new state of the run, which the caller must save.

    Raises:
        GuardError: If the run has rolled back too often without progress, or has no earlier checkpoint.
    """
    skipped, good_step = state.guard.skipped_in_a_row, state.guard.good_step
    what = f"skipped {skipped} steps in a row up to step {state.step} (reasons in {guard.journal})"
    if state.guard.rollbacks >= config.max_rollbacks:
        raise mark_on_all_ranks(
            GuardError(
                f"{what} after {state.guard.rollbacks} rollbacks without progress "
                f"(guard.max_rollbacks={config.max_rollbacks}); inspect the clips listed there, lower optim.lr, or "
                "raise guard.spike_factor if the large gradients are harmless; then run the same command again"
            )
        )
    folder = resume.find_latest(run_dir, shards, up_to=good_step)
    if folder is None:
        raise mark_on_all_ranks(
            GuardError(f"{what}, and no checkpoint was saved before them; lower optim.lr and start a new run")
        )
    on_main(ranks, lambda: _discard(run_dir, good_step))
    found = RunState.from_json(resume.load(folder, shards).state)
    reason = f"excluded by the guards: skipped {skipped} steps up to step {state.step}"
    quarantine = state.guard.quarantine | dict.fromkeys(state.guard.suspects, reason)
    found.guard = replace(
        found.guard,
        quarantine=found.guard.quarantine | quarantine,
        rollbacks=state.guard.rollbacks + 1,
        rollback_step=state.step,
    )
    logger.warning("%s; rolled back to step %d without their %d clips", what, found.step, len(state.guard.suspects))
    guard.note_rollback(state.step, found.step, found.guard)
    resume.set_aside_newer(run_dir, found.step, ranks)
    return found


def _discard(run_dir: str | Path, newer_than: int) -> None:
    try:
        writer.discard_newer(run_dir, newer_than)
    except OSError as error:
        raise CheckpointError(
            f"cannot remove the checkpoints of {run_dir} after step {newer_than}, which were saved while steps were "
            f"skipped ({error}); remove them and run the same command again"
        ) from error
