"""Held-out loss at fixed times, with the same clips, frames and noise each time, so that only the weights change.

Every rank runs the same number of forward passes; a rank without a pack runs a padding pack.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowception.data.pack import Pack, build_pack, empty_pack
from flowception.data.plan import Plan
from flowception.data.step_plan import PackPlan
from flowception.flow.delays import build_delay_law
from flowception.flow.loss import insertion_loss_sum, velocity_loss_sum
from flowception.packing.balance import CARRIED, pack_clips
from flowception.ranges import check_ranges, integer, list_of, number
from flowception.shards.reader import ClipReader
from flowception.training.distributed.collectives import Ranks, all_sum


@dataclass(kw_only=True)
class ValidationConfig:
    """Held-out loss. ``data.heldout_fraction`` sets the held-out split."""

    every_steps: int | None = 1000
    """Steps between validations; None is off."""
    num_clips: int = 64
    """Held-out clips, the same each time."""
    global_times: list[float] = field(default_factory=lambda: [0.25, 0.75, 1.25, 1.75])
    """Global times tau_g >= 0 at which to measure the loss. A clip whose clock never reaches a time is excluded from
    it: clocks end at 2, for ``full_sequence`` at 1, and for ``autoregressive`` at the number of generated frames."""

    def __post_init__(self) -> None:
        rules = {
            "every_steps": integer(at_least=1).or_null("off"),
            "num_clips": integer(at_least=1),
            "global_times": list_of(number(at_least=0)),
        }
        check_ranges("validation", self, rules)


class Validation:
    """Measures the held-out loss of a run."""

    def __init__(self, config: ValidationConfig, plan: Plan, reader: ClipReader, ranks: Ranks) -> None:
        """Select the clips and plan their packs.

        Args:
            config: Clips and times.
            plan: Plan of the held-out rows, made with a fixed seed.
            reader: Reader of their latents.
            ranks: This rank.
        """
        self._plan, self._reader, self._ranks = plan, reader, ranks
        by_id = plan.rows[np.argsort(plan.index.clips["clip_id"][plan.rows], kind="stable")]
        self._rows: NDArray[np.int64] = by_id[: config.num_clips].astype(np.int64)
        self._packs = {time: packs for time in config.global_times if (packs := self._plan_packs(time))}

    def _uniforms(self, global_time: float) -> NDArray[np.float64]:
        """The uniform draw that gives each clip this time; at least 1 if it never has this time in training."""
        process, places = self._plan.process, np.arange(len(self._rows))
        roles = self._plan.clip_draws(PackPlan(0, 0, self._rows, places)).clips.roles
        times = torch.full((len(places),), global_time, dtype=torch.float64)
        return build_delay_law(process.delay_law).uniform_of(times, roles, process.insertion_share).numpy()

    def _plan_packs(self, global_time: float) -> list[PackPlan]:
        """Pack all clips at one time, first come, first served."""
        u_time = self._uniforms(global_time)
        places = np.flatnonzero(u_time < 1)
        if not len(places):
            return []
        rows, u_time = self._rows[places], u_time[places]
        draws = self._plan.clip_draws(PackPlan(0, 0, rows, places, u_time))
        latent = draws.clips.visible_frames.numpy() * self._plan.index.tokens_per_frame[rows]
        tokens = latent + draws.text_tokens
        left, packs = np.arange(len(rows)), list[PackPlan]()
        while len(left):
            taken = pack_clips(tokens[left], tokens[left].astype(float), 1, self._plan.sizes.token_budget) != CARRIED
            chosen = left[taken]
            packs.append(PackPlan(0, len(packs), rows[chosen], places[chosen], u_time[chosen]))
            left = left[~taken]
        return packs

    @torch.no_grad()
    def run(self, engine: Any) -> dict[str, float]:
        """Measure the loss of the engine's current weights. Collective.

        Args:
            engine: DeepSpeed engine; switched to evaluation mode and back.

        Returns:
            ``validation/loss``, its two terms, and ``validation/velocity/TIME`` for each time.
        """
        engine.eval()
        result, totals = {}, np.zeros(4)
        for time, packs in self._packs.items():
            sums = np.array(all_sum(self._sums(engine, packs), self._ranks.device))
            totals += sums
            result[f"validation/velocity/{time:g}"] = float(sums[0] / max(sums[1], 1.0))
        engine.train()
        velocity, insertion = totals[0] / max(totals[1], 1.0), totals[2] / max(totals[3], 1.0)
        weight = self._plan.process.insertion_loss_weight
        return {
            "validation/loss": float(velocity + weight * insertion),
            "validation/loss/velocity": float(velocity),
            "validation/loss/insertion": float(insertion),
            **result,
        }

    def _sums(self, engine: Any, packs: list[PackPlan]) -> list[float]:
        """Sums over this rank's packs: velocity loss, its elements, insertion loss, its sites."""
        sums = [0.0, 0.0, 0.0, 0.0]
        for first in range(0, len(packs), self._ranks.world_size):
            number = first + self._ranks.rank
            pack: Pack = (
                build_pack(self._plan, packs[number], self._reader) if number < len(packs) else empty_pack(self._plan)
            )
            pack = pack.to(self._ranks.device)
            output = engine(pack)
            ones_token, ones_frame = torch.ones_like(pack.weight_token), torch.ones_like(pack.weight_frame)
            velocity = velocity_loss_sum(output.velocity, pack.velocity_target, pack.velocity_mask, ones_token)
            insertion = insertion_loss_sum(output.log_rate, pack.missing, pack.insertion_mask, ones_frame)
            channels = pack.velocity_target.shape[1]
            counts = (int(pack.velocity_mask.sum()) * channels, int(pack.insertion_mask.sum()))
            for i, value in enumerate((float(velocity), counts[0], float(insertion), counts[1])):
                sums[i] += value
        return sums
