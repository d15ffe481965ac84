"""Where a run is: everything besides tensors that a checkpoint holds."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from flowception.data.loader import StepBatch
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor
from flowception.errors import DataError, PlanError
from flowception.shards.open import DataConfig
from flowception.training.distributed.collectives import gather_values, mark_on_all_ranks
from flowception.training.guard import GuardState

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """Counters and the place in the data."""

    step: int = 0
    """Steps done."""
    cursor: Cursor = field(default_factory=Cursor)
    """The step to do next."""
    plan_fingerprint: str = ""
    """Fingerprint of the plan of the cursor's epoch."""
    plan_quarantine: list[str] = field(default_factory=list)
    """Keys of clips that the epoch's plan leaves out."""
    quarantine: dict[str, str] = field(default_factory=dict)
    """Keys of all clips found bad so far, with the reason; the next epoch's plan leaves them out."""
    clips: int = 0
    """Clips seen; those that could not be read are not counted."""
    tokens: int = 0
    """Visible tokens of these clips."""
    skipped_steps: int = 0
    """Steps that the guards refused, so that the weights stayed."""
    guard: GuardState = field(default_factory=GuardState)
    """What the guards remember."""

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def advance(self, next_cursor: Cursor, clips: int, tokens: int) -> None:
        """Note that a step is done.

        Args:
            next_cursor: The step after it.
            clips: What it trained on.
            tokens: Visible tokens of these clips.
        """
        self.step += 1
        self.cursor = next_cursor
        self.clips += clips
        self.tokens += tokens

    def bad_clips_of_epoch(self) -> int:
        """Clips found bad so far in the epoch that the run is in."""
        return len(self.quarantine.keys() - set(self.plan_quarantine))

    def left_out_of_epoch(self) -> dict[str, str]:
        """Clips of the epoch's plan that are padding by the guards' choice, with the reason."""
        not_planned = set(self.plan_quarantine)
        return {key: reason for key, reason in self.guard.quarantine.items() if key not in not_planned}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> RunState:
        """From the state of a checkpoint; what else is in it is left alone."""
        own = {name: found[name] for name in cls.__dataclass_fields__}
        return cls(**own | {"cursor": Cursor(**found["cursor"]), "guard": GuardState(**found["guard"])})


def plan_of(state: RunState, plan: Plan) -> Plan:
    """The plan of the epoch that a run is in, checked to be the one that the epoch began with.

    Args:
        state: Where the run is; its fingerprint and quarantine are brought up to date where an epoch begins.
        plan: The plan of the configuration, without quarantine.

    Returns:
        The plan to go on with.

    Raises:
        PlanError: If the plan was changed in mid-epoch.
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
    """List all ranks' bad clips of a step; too many are a fault of the storage. Collective.

    Args:
        state: Where the run is, this step not yet counted; its quarantine is added to.
        batch: This rank's packs.
        config: How many bad clips an epoch may have.

    Raises:
        DataError: On all ranks, if no clip of a full step could be read, or more of the epoch's than allowed.
    """
    own = [(bad.key, bad.reason) for bad in batch.quarantined if bad.key not in state.guard.quarantine]
    found = [pair for pairs in gather_values(own) for pair in pairs]
    for key, reason in found:
        state.quarantine[key] = reason
        logger.info("clip %s is skipped from the next epoch on: %s", key, reason)
    in_epoch, allowed, plan = state.bad_clips_of_epoch(), config.max_bad_clips, batch.step_plan
    if len(found) == plan.clips and batch.next_cursor.epoch == plan.epoch:  # an epoch's last step may be one clip
        what = f"none of the {plan.clips} clips of step {plan.step} of epoch {plan.epoch} could be read"
    elif allowed is not None and in_epoch > allowed:
        what = f"{in_epoch} clips of epoch {plan.epoch} could not be read, more than data.max_bad_clips={allowed}"
    else:
        return
    stores = " and ".join(share.path for share in config.sets)
    raise mark_on_all_ranks(DataError(f"{what}; check the storage of {stores}. Last error: {found[-1][1]}"))
