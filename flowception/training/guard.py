"""Guards that skip bad optimizer steps, and the state that they keep.

All ranks skip a step together, leaving weights, moments and EMA unchanged, if

* the loss of any rank is not finite, even if the gradients are;
* the gradient is not finite;
* its norm is a spike: more than ``spike_factor`` times the usual norm.

The usual norm m is a running mean over applied steps. After the n-th applied step, with norm g,
``m_n = m_(n-1) + (g - m_(n-1)) / min(n, M)`` with ``M = spike_memory_steps``: the plain mean of the first M norms, then
an exponential mean with time constant M. Spikes are not checked while ``n < M``. The state is part of the checkpoint,
so a resumed run makes the same decisions.

Every skipped step is a line of ``skipped.jsonl`` in the run directory. The file is append-only: a step that a resumed
or rolled back run repeats and skips again is listed twice.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowception.data.loader import StepBatch, packs_of_rank
from flowception.data.step_plan import PackPlan, StepPlan
from flowception.ranges import check_ranges, integer, number
from flowception.training.distributed.collectives import Ranks, gather_values
from flowception.training.distributed.zero import Refuse, StepOutcome

logger = logging.getLogger(__name__)

JOURNAL = "skipped.jsonl"
LOSS_NOT_FINITE = "the loss is not finite"
SPIKE = "gradient spike"
NO_CLIPS = "no clip of the step is left"
"""Not an error: an earlier rollback turned every clip of the step into padding."""


@dataclass(kw_only=True)
class GuardConfig:
    """When to skip a step, when to roll back, and when to treat the run as hung."""

    spike_factor: float | None = 10.0
    """Skip a step whose gradient norm is more than this times the usual norm; None is off."""
    spike_memory_steps: int = 128
    """Applied steps in the running mean of the norm; spikes are not checked before that many."""
    max_skipped_in_a_row: int | None = 8
    """Skipped steps in a row after which the run rolls back to the last checkpoint before them and excludes their
    clips. None never rolls back."""
    max_rollbacks: int = 3
    """Rollbacks without progress before the run ends with an error."""
    hang_timeout_s: float | None = 1200.0
    """If a rank makes no progress for this long, all ranks write their stacks and the job ends with exit code 86; None
    is off. Choose it longer than the longest save (and ``checkpoint.save_timeout_s``), validation or compilation, and
    shorter than the 30-minute timeout of collectives."""
    data_stall_warning_s: float | None = 60.0
    """Warn if the next batch takes longer than this, with the clips and the worker it waits for; None is off."""

    def __post_init__(self) -> None:
        rules = {
            "spike_factor": number(above=1, infinite=True).or_null("off"),
            "spike_memory_steps": integer(at_least=1),
            "max_skipped_in_a_row": integer(at_least=1).or_null("off"),
            "max_rollbacks": integer(at_least=0),
            "hang_timeout_s": number(above=0, infinite=True).or_null("off"),
            "data_stall_warning_s": number(above=0, infinite=True).or_null("off"),
        }
        check_ranges("guard", self, rules)


@dataclass
class GuardState:
    """State of the guards; part of the checkpoint, the same on all ranks."""

    usual_norm: float = 0.0
    """Running mean of the gradient norm over applied steps."""
    norms_seen: int = 0
    """Applied steps in ``usual_norm``."""
    good_step: int = 0
    """Steps done before the first of the current skipped steps in a row."""
    skipped_in_a_row: int = 0
    """Steps skipped since the last applied one."""
    suspects: list[str] = field(default_factory=list)
    """Keys of the clips of these skipped steps."""
    quarantine: dict[str, str] = field(default_factory=dict)
    """Keys of clips that rollbacks excluded, with the reason. They become padding for the rest of the epoch, and the
    next epoch's plan excludes them."""
    rollbacks: int = 0
    """Rollbacks since the run last applied a step after ``rollback_step``."""
    rollback_step: int = 0
    """Steps done when the run last rolled back."""


class Guard:
    """Decides which steps of a run to skip."""

    def __init__(self, config: GuardConfig, run_dir: str | Path, ranks: Ranks) -> None:
        """Create the guard of a run.

        Args:
            config: What to skip.
            run_dir: Directory of ``skipped.jsonl``.
            ranks: This rank.
        """
        self._config, self._ranks = config, ranks
        self.journal = Path(run_dir) / JOURNAL

    def refusal(self, state: GuardState, loss_sums: Sequence[float], clips: int) -> Refuse:
        """Return the function that decides in ``optimizer_step`` whether to skip a step.

        Args:
            state: State of the guards.
            loss_sums: Loss sums of all ranks.
            clips: Clips of the step that are not padding.
        """

        def refuse(norm: float) -> str | None:
            if not all(map(math.isfinite, loss_sums)):
                return LOSS_NOT_FINITE
            if not clips:
                return NO_CLIPS
            return SPIKE if self._is_spike(state, norm) else None

        return refuse

    def _is_spike(self, state: GuardState, norm: float) -> bool:
        config = self._config
        if config.spike_factor is None or state.norms_seen < config.spike_memory_steps:
            return False
        return norm > config.spike_factor * state.usual_norm

    def note(
        self,
        state: GuardState,
        step: int,
        batch: StepBatch,
        outcome: StepOutcome,
        loss_by_rank: Sequence[float],
        not_finite: Sequence[int],
        clip_keys: Callable[[StepPlan], list[str]],
    ) -> bool:
        """Update the state after a step, and record the step if it was skipped. Collective.

        Args:
            state: State of the guards, updated in place.
            step: Number of the step, from 1.
            batch: This rank's packs.
            outcome: Result of the optimizer step, the same on all ranks.
            loss_by_rank: Contribution of each rank to the loss of the step.
            not_finite: Micro-steps of this rank with a loss that is not finite.
            clip_keys: Returns the keys of the step's clips.

        Returns:
            Whether the step counts as skipped.
        """
        if outcome.refused == NO_CLIPS:
            state.good_step = state.good_step if state.skipped_in_a_row else step
            return False
        if outcome.refused is None:
            state.good_step = step
            state.norms_seen += 1
            window = min(state.norms_seen, self._config.spike_memory_steps)
            state.usual_norm += (outcome.grad_norm - state.usual_norm) / window
            state.skipped_in_a_row, state.suspects = 0, []
            if step > state.rollback_step:
                state.rollbacks = 0
            return False
        state.skipped_in_a_row += 1
        plan, keys = batch.step_plan, clip_keys(batch.step_plan)
        state.suspects = sorted({*state.suspects, *keys} - state.quarantine.keys())
        mine = [_describe_pack(batch, self._ranks, micro_step) for micro_step in not_finite]
        self._write(
            {
                "step": step,
                "epoch": plan.epoch,
                "step_of_epoch": plan.step,
                "reason": outcome.refused,
                "grad_norm": outcome.grad_norm,
                "usual_grad_norm": state.usual_norm,
                "loss_by_rank": list(loss_by_rank),
                "clips": keys,
                "packs_not_finite": [pack for own in gather_values(mine) for pack in own],
            }
        )
        logger.warning(
            "skipped step %d: %s (gradient norm %.4g, usual %.4g); %d in a row, see %s",
            step,
            outcome.refused,
            outcome.grad_norm,
            state.usual_norm,
            state.skipped_in_a_row,
            self.journal,
        )
        return True

    def note_rollback(self, from_step: int, to_step: int, state: GuardState) -> None:
        """Record a rollback in the journal."""
        left_out = len(state.quarantine)
        self._write({"step": from_step, "rollback_to": to_step, "rollbacks": state.rollbacks, "left_out": left_out})

    def must_roll_back(self, state: GuardState) -> bool:
        """Whether enough steps in a row were skipped that the run must roll back."""
        most = self._config.max_skipped_in_a_row
        return most is not None and state.skipped_in_a_row >= most

    def may_roll_back(self, state: GuardState) -> bool:
        """Whether a rollback may follow, so that no checkpoint should be saved now.

        The rollback would remove it, and saving it would prune older checkpoints that the rollback needs.
        """
        return self._config.max_skipped_in_a_row is not None and state.skipped_in_a_row > 0

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line. On a full disk the line is lost, but the run continues."""
        if not self._ranks.is_main:
            return
        try:
            with self.journal.open("a") as stream:
                stream.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        except OSError as error:
            logger.warning("cannot write %s (%s); step %d is missing from it", self.journal, error, line["step"])


def _describe_pack(batch: StepBatch, ranks: Ranks, micro_step: int) -> dict[str, Any]:
    pack: PackPlan | None = packs_of_rank(batch.step_plan.packs, ranks.rank, ranks.world_size)[micro_step]
    number = None if pack is None else pack.number
    return {"rank": ranks.rank, "pack": number, "clips": list(batch.packs[micro_step].keys)}


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite with None, because JSON cannot represent them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
