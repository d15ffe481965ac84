"""State of a run besides tensors, as stored in a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from flowception.data.loader import StepBatch
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor
from flowception.errors import CheckpointError, DataError, PlanError
from flowception.shards.open import DataConfig
from flowception.training.distributed.collectives import gather_values, mark_on_all_ranks
from flowception.training.guard import GuardState

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """Counters and the position in the data."""

    step: int = 0
    """Steps done."""
    cursor: Cursor = field(default_factory=Cursor)
    """Position of the next step in the data."""
    plan_fingerprint: str = ""
    """Fingerprint of the plan of the cursor's epoch."""
    plan_quarantine: list[str] = field(default_factory=list)
    """Keys of clips that the epoch's plan excludes."""
    quarantine: dict[str, str] = field(default_factory=dict)
    """Keys of all bad clips so far, with the reason; the next epoch's plan excludes them."""
    clips: int = 0
    """Clips trained on; unreadable ones are not counted."""
    tokens: int = 0
    """Visible tokens of these clips."""
    skipped_steps: int = 0
    """Steps that the guards skipped, leaving the weights unchanged."""
    guard: GuardState = field(default_factory=GuardState)
    """State of the guards."""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary."""
        return asdict(self)

    def advance(self, next_cursor: Cursor, clips: int, tokens: int) -> None:
        """Count a finished step.

        Args:
            next_cursor: Position of the next step.
            clips: Clips that the step trained on.
            tokens: Visible tokens of these clips.
        """
        self.step += 1
        self.cursor = next_cursor
        self.clips += clips
        self.tokens += tokens

    def bad_clips_of_epoch(self) -> int:
        """Number of bad clips so far in the current epoch."""
        return len(self.quarantine.keys() - set(self.plan_quarantine))

    def skipped_in_epoch(self) -> dict[str, str]:
        """Clips of the epoch's plan that the guards turned into padding, with the reason."""
        not_planned = set(self.plan_quarantine)
        return {key: reason for key, reason in self.guard.quarantine.items() if key not in not_planned}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> RunState:
        """Create from the state in a checkpoint; other entries there are ignored.

        Raises:
            CheckpointError: On all ranks, if an entry is missing or of another form.
        """
        try:
            own = {name: found[name] for name in cls.__dataclass_fields__}
            return cls(**own | {"cursor": Cursor(**found["cursor"]), "guard": GuardState(**found["guard"])})
        except (KeyError, TypeError) as error:
            reason = (
                f"the checkpoint's state was written by another version ({error!r}); continue with that version, or "
                "start a new run with init_from"
            )
            raise mark_on_all_ranks(CheckpointError(reason)) from error


def plan_of(state: RunState, plan: Plan) -> Plan:
    """Return the plan of the current epoch, and check that it is the one the epoch started with.

    Args:
        state: State of the run; its fingerprint and quarantine are updated at the start of an epoch.
        plan: The plan of the configuration, without quarantine.

    Returns:
        The plan to continue with.

    Raises:
        PlanError: If the plan changed in the middle of an epoch.
    """
    if state.cursor.step == 0:
        state.plan_quarantine = sorted({*state.plan_quarantine, *state.quarantine, *state.guard.quarantine})
    if state.plan_quarantine:
        plan = plan.with_quarantine(state.plan_quarantine)
    if state.cursor.step and plan.fingerprint != state.plan_fingerprint:
        raise PlanError(
            f"the plan changed in the middle of epoch {state.cursor.epoch} (step {state.cursor.step}): its "
            f"fingerprint is {plan.fingerprint[:12]}, at the start of the epoch it was {state.plan_fingerprint[:12]}; "
            "restore seed, data, model sizes, token_budget, packs_per_step and the process (see config.yaml in the run "
            "directory), or start a new run with init_from"
        )
    state.plan_fingerprint = plan.fingerprint
    return plan


def note_bad_clips(state: RunState, batch: StepBatch, config: DataConfig) -> None:
    """Quarantine the bad clips of a step on all ranks. Too many of them indicate a storage problem. Collective.

    Args:
        state: State of the run before this step is counted; its quarantine is updated.
        batch: This rank's packs.
        config: How many bad clips an epoch may have.

    Raises:
        DataError: On all ranks, if a full step has no readable clip, or the epoch has more bad clips than allowed.
    """
    own = [(bad.key, bad.reason) for bad in batch.quarantined if bad.key not in state.guard.quarantine]
    found = [pair for pairs in gather_values(own) for pair in pairs]
    for key, reason in found:
        state.quarantine[key] = reason
        logger.info("clip %s is skipped from the next epoch on: %s", key, reason)
    in_epoch, allowed, plan = state.bad_clips_of_epoch(), config.max_bad_clips, batch.step_plan
    is_last = batch.next_cursor.epoch != plan.epoch  # it may be a single clip
    if len(found) == plan.clips and not is_last:
        what = f"none of the {plan.clips} clips of step {plan.step} of epoch {plan.epoch} could be read"
    elif allowed is not None and in_epoch > allowed:
        what = f"{in_epoch} clips of epoch {plan.epoch} could not be read, more than data.max_bad_clips={allowed}"
    else:
        return
    stores = " and ".join(share.path for share in config.sets)
    raise mark_on_all_ranks(DataError(f"{what}; check the storage of {stores}. Last error: {found[-1][1]}"))
