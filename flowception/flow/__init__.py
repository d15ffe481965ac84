"""The generative process: schedules, roles, extended time, losses, and the sampler. Pure torch and numpy.

``draw_clips`` turns uniforms into training states, ``sample`` turns a predictor into clips. Both follow docs/method.md.
Nothing here depends on files, networks or distributed processes.
"""

from flowception.flow.context_law import context_probability, length_law, present_law
from flowception.flow.extended_time import (
    ClipDraws,
    ProcessConfig,
    draw_clips,
    expected_attention_ratio,
)
from flowception.flow.guidance import Prediction, guide
from flowception.flow.loss import (
    Denominators,
    denominators,
    expected_counts,
    insertion_loss_sum,
    rate_from_log,
    velocity_loss_sum,
)
from flowception.flow.path import interpolate, shift_time, velocity_target
from flowception.flow.prior import effective_sample_ratio
from flowception.flow.sampler import CountedPredictor, Predictor, SampleArguments, sample, sample_states
from flowception.flow.sampler_state import Context, SamplerConfig, SampleResult, SamplerState, StepRecord
from flowception.flow.schedule import InsertionSchedule, build_schedule
from flowception.flow.streaming import FinalFrames, final_lengths, stream_frames
from flowception.flow.task import (
    TASK_NUMBERS,
    TASKS,
    Role,
    RoleConfig,
    draw_roles,
    is_context,
    is_generated,
    may_insert,
    task_number,
)

__all__ = [
    "TASKS",
    "TASK_NUMBERS",
    "ClipDraws",
    "Context",
    "CountedPredictor",
    "Denominators",
    "FinalFrames",
    "InsertionSchedule",
    "Prediction",
    "Predictor",
    "ProcessConfig",
    "Role",
    "RoleConfig",
    "SampleArguments",
    "SampleResult",
    "SamplerConfig",
    "SamplerState",
    "StepRecord",
    "build_schedule",
    "context_probability",
    "denominators",
    "draw_clips",
    "draw_roles",
    "effective_sample_ratio",
    "expected_attention_ratio",
    "expected_counts",
    "final_lengths",
    "guide",
    "insertion_loss_sum",
    "interpolate",
    "is_context",
    "is_generated",
    "length_law",
    "may_insert",
    "present_law",
    "rate_from_log",
    "sample",
    "sample_states",
    "shift_time",
    "stream_frames",
    "task_number",
    "velocity_loss_sum",
    "velocity_target",
]
