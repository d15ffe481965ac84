"""Arms and budgets of the claims study.

All arms share ``settings.yaml``, the data and the network. An arm adds a delay law and an attention pattern as
``key=value`` overrides. It is trained up to the first step at which it has spent ``Budget.training_flops``, which is
known from the plan before training. Autoregression trains one frame per clip and pass, so its runs continue until they
have trained as many frames with a velocity loss as Flowception, and are measured there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor, StepPlan
from flowception.packing.flops import training_flops
from flowception.training.config import TrainConfig, load_config

BASE_CONFIG = Path(__file__).with_name("settings.yaml")
EQUAL_FLOPS, EQUAL_FLOW_FRAMES = "training_flops", "flow_frames"
"""Measurement points: the quantity of which an arm has spent as much as Flowception."""
FLOWCEPTION = "flowception"
WINDOWS = (1, 2, 4)


@dataclass(frozen=True)
class Arm:
    """A variant to train."""

    name: str
    words: tuple[str, ...]
    """``key=value`` overrides of ``settings.yaml``."""
    measured_at: tuple[str, ...] = (EQUAL_FLOPS,)

    def results(self) -> list[str]:
        """Names of the results, one per measurement point."""
        return [result_name(self.name, point) for point in self.measured_at]


def result_name(arm: str, point: str) -> str:
    """Name of a result; at equal FLOPs it is the name of the arm."""
    return arm if point == EQUAL_FLOPS else f"{arm}_at_equal_{point}"


def _windows(name: str, law: str) -> list[Arm]:
    words = (f"delay_law={law}", "model.attention_pattern=window")
    return [Arm(f"{name}_window_{k}", (*words, f"model.attention_window_frames={k}")) for k in WINDOWS]


_BOTH = (EQUAL_FLOPS, EQUAL_FLOW_FRAMES)
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("autoregressive_causal", ("delay_law=autoregressive", "model.attention_pattern=causal"), measured_at=_BOTH),
        Arm("autoregressive_full", ("delay_law=autoregressive",), measured_at=_BOTH),
        Arm(FLOWCEPTION, ("delay_law=uniform",)),
        Arm("left_to_right", ("delay_law=left_to_right",)),
        Arm("hierarchical", ("delay_law=hierarchical",)),
        Arm("random", ("delay_law=random",)),
        Arm("full_sequence", ("delay_law=full_sequence",)),
        *_windows(FLOWCEPTION, "uniform"),
        *_windows("full_sequence", "full_sequence"),
    )
}
"""Arms by name, longest runs first."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Size of the study."""

    seeds: int
    training_flops: float
    """Forward and backward FLOPs of each run."""
    words: tuple[str, ...]
    """``key=value`` overrides: sizes of the network and of packs."""
    data_clips: int
    sampled_clips: int
    """Clips sampled and scored per result."""
    num_inference_steps: int


BUDGETS: dict[str, Budget] = {
    "quick": Budget(
        seeds=3,
        training_flops=1.5e11,
        words=("token_budget=512", "model.hidden_size=64", "model.num_layers=3", "model.num_heads=4"),
        data_clips=8192,
        sampled_clips=256,
        num_inference_steps=20,
    ),
    "full": Budget(
        seeds=5,
        training_flops=1e13,
        words=("token_budget=2048", "model.hidden_size=96", "model.num_layers=4", "model.num_heads=4"),
        data_clips=65536,
        sampled_clips=512,
        num_inference_steps=50,
    ),
}


def arm_config(arm: Arm, budget: Budget, seed: int, data: Path, run_dir: Path, max_steps: int = 1) -> TrainConfig:
    """Load the configuration of one run."""
    words = [f"data.path={data}", f"run_dir={run_dir}", f"max_steps={max_steps}", f"seed={seed}"]
    return load_config([BASE_CONFIG], [*words, *budget.words, *arm.words])


class Spent(NamedTuple):
    """Cost of a run after some steps."""

    steps: int
    training_flops: float
    """Forward and backward FLOPs of all visible tokens, excluding padding."""
    flow_frames: int
    """Frames with a velocity loss."""
    trained_clips: int
    tokens: int
    """Visible tokens."""


def spend(plan: Plan, point: str, target: float) -> Spent:
    """Follow a plan to the first step that reaches a target.

    Args:
        plan: Plan of the run.
        point: ``training_flops`` or ``flow_frames``.
        target: Amount to reach.

    Returns:
        Total cost up to and including that step.
    """
    cursor, spent = Cursor(), Spent(0, 0.0, 0, 0, 0)
    while getattr(spent, point) < target:
        step = plan.step(cursor)
        flops, frames = _cost_of(plan, step)
        spent = Spent(
            spent.steps + 1,
            spent.training_flops + flops,
            spent.flow_frames + frames,
            spent.trained_clips + step.clips,
            spent.tokens + step.tokens,
        )
        cursor = plan.next(cursor)
    return spent


def _cost_of(plan: Plan, step: StepPlan) -> tuple[float, int]:
    """Training FLOPs and number of frames with a velocity loss of a step."""
    flops, flow_frames = 0.0, 0
    for pack in step.packs:
        draws, clips = plan.clip_draws(pack), plan.index.clips[pack.rows]
        visible, text = draws.clips.visible_frames.numpy(), draws.text_tokens
        flops += float(training_flops(plan.spec, visible, clips["height"], clips["width"], text).sum())
        flow_frames += int(draws.clips.flow_mask.sum())
    return flops, flow_frames
