"""What a configuration would do, at any number of ranks, without starting anything: ``train/main.py --dry-run``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import numpy as np

from flowception.config import TrainConfig, dump
from flowception.data.index import ClipIndex
from flowception.data.plan import Plan
from flowception.errors import ConfigError, Problems
from flowception.nn.backbone import count_parameters
from flowception.training.hardware import GIB, PEAK_TFLOPS_BF16
from flowception.training.memory import MemoryPerRank, block_activations, checkpoint_bytes, memory_per_rank
from flowception.training.problems import check_data, check_run
from flowception.training.step_time import DAY_S, StepTime, bytes_between_nodes, compute_s
from flowception.training.traffic import TrafficPerStep, traffic_per_step
from flowception.training.zero import ZeroConfig

_USUAL_WORLD_SIZES = (8, 64)
_USUAL_GROUP = 8
_PEAK_GPU = "H100"


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a dry run cannot find in the configuration."""

    world_sizes: str = ""
    """Comma-separated numbers of ranks; empty for the launched number, 8 and 64."""
    hfu: float = 0.4
    """Share of the peak at which a rank computes, the recomputation of blocks included (hardware FLOPs utilisation)."""
    peak_tflops: float | None = None
    """TFLOP/s of one rank at most; None takes ``logging.peak_tflops``, or that of an H100."""
    bandwidth_gb_per_s: float = 25.0
    """GB/s that a GPU's share of the network between nodes carries each way; 25 is half of a 400 Gb/s adapter a GPU."""
    gpus_per_node: int = 8
    """GPUs of a node, which share its network."""
    clip: str | None = None
    """Latent frames x rows x columns of clips to plan with in place of the set's; None reads the set."""
    text_tokens: int = 0
    """Text tokens of each such clip."""
    num_clips: int = 20_000
    """How many such clips."""

    def __post_init__(self) -> None:
        if not 0 < self.hfu <= 1:
            raise ConfigError(f"--hfu is {self.hfu}; give a share above 0 and at most 1, such as 0.4")
        if not 0 < self.bandwidth_gb_per_s < float("inf"):
            raise ConfigError(f"--bandwidth is {self.bandwidth_gb_per_s}; give GB/s above 0, such as 25")
        if self.gpus_per_node < 1:
            raise ConfigError(f"--gpus-per-node is {self.gpus_per_node}; give 1 or more")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < float("inf"):
            raise ConfigError(f"--peak-tflops is {self.peak_tflops}; give a number above 0, such as 989")
        if self.num_clips < 1 or self.text_tokens < 0:
            raise ConfigError(
                f"--num-clips is {self.num_clips} and --text-tokens {self.text_tokens}; give at least 1 and 0"
            )

    def index(self) -> ClipIndex | None:
        """An index of clips of the given size; None where the set is read."""
        if self.clip is None:
            return None
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", self.clip):
            raise ConfigError(f"--clip is {self.clip!r}; write latent frames x rows x columns, such as 19x8x8")
        frames, height, width = map(int, self.clip.split("x"))
        lengths = np.full(self.num_clips, frames)
        return ClipIndex.from_arrays(frames=lengths, height=height, width=width, text_tokens=self.text_tokens)


def world_sizes(text: str) -> list[int]:
    """World sizes to report: those of ``text`` (comma-separated), or the launched one, 8 and 64."""
    if not text:
        return sorted({int(os.environ.get("WORLD_SIZE", "1")), *_USUAL_WORLD_SIZES})
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ConfigError(f"--world-size is {text!r}; give positive numbers, such as 8,64")
    return sizes


def report(config: TrainConfig, assumed: Assumptions) -> tuple[str, list[str]]:
    """The report.

    Args:
        config: The run.
        assumed: What the configuration does not say.

    Returns:
        Its text (resolved configuration, parameters, FLOPs, and by world size memory, traffic and days), and the
        problems that would stop the run, which the text names too.
    """
    sizes, problems = world_sizes(assumed.world_sizes), Problems()
    index = assumed.index()
    plan = None
    if index is None:
        plan = check_data(config, problems)
    else:
        with problems.collected():
            plan = Plan(index, None, config, config.model.flop_spec(), config.seed)
    check_run(config, sizes if assumed.world_sizes else [], problems)
    parameters = count_parameters(config.model)
    lines = [
        dump(config).rstrip(),
        "",
        f"parameters: {parameters:,} ({parameters / 1e9:.3f} B)",
        f"checkpoint: {checkpoint_bytes(parameters) / 1e9:.2f} GB (weights, two moments and EMA in fp32); each rank "
        "holds a copy of its share in host memory, to save in the background",
        *_plan_lines(config, plan, assumed),
        "",
        *_memory_table(config, parameters, sizes),
        "",
        *_times(config, plan, parameters, sizes, assumed),
        "",
        *_stage_table(config, parameters, sizes, assumed),
        "",
        *(f"problem {number}: {problem}" for number, problem in enumerate(problems.found, 1)),
        "dry run: nothing was started",
    ]
    return "\n".join(lines), problems.found


def _plan_lines(config: TrainConfig, plan: Plan | None, assumed: Assumptions) -> list[str]:
    if plan is None:
        return ["data: no plan can be made (see the problems); --clip 19x8x8 plans with clips of a size instead"]
    steps = plan.steps_in_epoch(0)
    flops = plan.mean_step_flops(0)
    data = (
        f"data: {len(plan.rows):,} clips, {steps:,} steps per epoch, {config.max_steps / steps:.2f} epochs in max_steps"
    )
    if assumed.clip is not None:
        text = f", each with {assumed.text_tokens} text tokens" if assumed.text_tokens else ""
        data = f"data: clips of {assumed.clip} latents assumed{text}, about {len(plan.rows) / steps:.0f} a step"
    return [
        data,
        f"FLOPs per step: {flops:.4g} forward and backward, the mean of epoch 0, without recomputation",
    ]


def _packs(config: TrainConfig, world_size: int) -> int | None:
    """Micro-steps of a rank; None where there are too few packs."""
    return -(-config.packs_per_step // world_size) if config.packs_per_step >= world_size else None


def _row(name: str, values: list[str]) -> str:
    return f"{name:<18}" + "".join(f"{value:>10}" for value in values)


def _memory_table(config: TrainConfig, parameters: int, sizes: list[int]) -> list[str]:
    columns = [_memory(config, config.zero, parameters, size) for size in sizes]
    spec, stage = config.model.flop_spec(), config.zero.stage
    kept, block_input = block_activations(spec, config.token_budget, stage, config.precision)
    packs = [_packs(config, size) for size in sizes]
    lines = [
        f"memory per rank in GiB, {_stage_name(config.zero)}, {config.precision}, activations estimated with "
        f"{config.model.checkpointed_blocks()} of {spec.num_layers} blocks checkpointed "
        f"({(kept - block_input) / GIB:.2f} more for each that is not):",
        _row("ranks", [str(size) for size in sizes]),
        _row("packs per rank", ["refused" if number is None else str(number) for number in packs]),
    ]
    for part in [*vars(columns[0]), "total"]:
        values = [f"{getattr(memory, part) / GIB:.2f}" for memory in columns]
        lines.append(_row(part.replace("_", " "), values))
    return lines


def _times(
    config: TrainConfig, plan: Plan | None, parameters: int, sizes: list[int], assumed: Assumptions
) -> list[str]:
    """A step's time and the days of the whole run; ranks without a pack in a step's last micro-step wait."""
    if plan is None:
        return []
    peak, source = assumed.peak_tflops, "as given"
    if peak is None:
        peak, source = config.logging.peak_tflops, "logging.peak_tflops"
    if peak is None:
        peak, source = PEAK_TFLOPS_BF16[_PEAK_GPU], f"{_PEAK_GPU}, dense bf16"
    flops = plan.mean_step_flops(0)
    again = config.model.checkpointed_blocks() / config.model.flop_spec().num_layers
    columns: list[list[str]] = []
    for size in sizes:
        packs = _packs(config, size)
        if packs is None:
            columns.append(["refused"] * 6)
            continue
        crossing = _crossing(config, config.zero, parameters, size, packs, assumed)
        time = StepTime(
            compute_s(packs * flops / config.packs_per_step, assumed.hfu * peak, again),
            crossing / (assumed.bandwidth_gb_per_s * 1e9),
        )
        days = [seconds * config.max_steps / DAY_S for seconds in (time.overlapped_s, time.in_turn_s)]
        mfu = flops / (time.in_turn_s * size * peak * 1e12)
        columns.append(
            [f"{time.compute_s:.3f}", f"{crossing / 1e9:.2f}", f"{time.communication_s:.3f}"]
            + [f"{days[0]:.2f}", f"{days[1]:.2f}", f"{mfu:.3f}"]
        )
    recomputed = ", blocks computed again" if again else ""
    notes = [
        f"a step, at HFU {assumed.hfu:g} of {peak:g} TFLOP/s a rank ({source}){recomputed}",
        f"a step and GPU, {assumed.gpus_per_node} GPUs a node",
        f"a step, at {assumed.bandwidth_gb_per_s:g} GB/s a GPU between nodes; inside a node it is not counted",
        "if all communication runs beside the computing",
        "if none does",
        "what the log would show then",
    ]
    names = [
        "computing, s",
        "between nodes, GB",
        "communication, s",
        "days, overlapped",
        "days, in turn",
        "MFU, in turn",
    ]
    return [_row(name, list(row)) + f"   {note}" for name, row, note in zip(names, zip(*columns), notes, strict=True)]


def _crossing(
    config: TrainConfig, zero: ZeroConfig, parameters: int, world_size: int, packs: int, assumed: Assumptions
) -> float:
    """Bytes of a step that a GPU's share of the network between nodes carries."""
    return bytes_between_nodes(
        _traffic(config, zero, parameters, world_size, packs),
        world_size=world_size,
        gpus_per_node=assumed.gpus_per_node,
        group_size=zero.hierarchical_partition_size,
    )


def _stage_name(zero: ZeroConfig) -> str:
    group = zero.hierarchical_partition_size
    return f"ZeRO-{zero.stage}" + (f" in groups of {group}" if group else "")


def _stage_table(config: TrainConfig, parameters: int, sizes: list[int], assumed: Assumptions) -> list[str]:
    """Every way to shard beside the configured one: memory, and what a rank sends in a step."""
    group = config.zero.hierarchical_partition_size or _USUAL_GROUP
    ways = [replace(config.zero, stage=stage, hierarchical_partition_size=None) for stage in range(4)]
    ways.append(replace(config.zero, stage=3, hierarchical_partition_size=group))
    lines = [
        "memory of a rank, what it sends in a step, and what its share of the network between nodes carries, by way to "
        "shard (* as configured):",
        f"{'':<26}{'ranks':>6}{'memory GiB':>12}{'gathered GB':>13}{'in group GB':>13}{'reduced GB':>12}"
        f"{'between nodes GB':>18}",
    ]
    for size in sizes:
        packs = _packs(config, size)
        for zero in ways:
            if packs is None or (zero.hierarchical_partition_size and (size % group or size <= group)):
                continue
            traffic = _traffic(config, zero, parameters, size, packs)
            sent = "".join(f"{value / 1e9:>{width}.2f}" for value, width in zip(vars(traffic).values(), (13, 13, 12)))
            mark = "*" if zero == config.zero else " "
            memory = _memory(config, zero, parameters, size).total / GIB
            crossing = _crossing(config, zero, parameters, size, packs, assumed) / 1e9
            lines.append(f"{mark + ' ' + _stage_name(zero):<26}{size:>6}{memory:>12.2f}{sent}{crossing:>18.2f}")
    return lines


def _traffic(config: TrainConfig, zero: ZeroConfig, parameters: int, world_size: int, packs: int) -> TrafficPerStep:
    return traffic_per_step(
        parameters=parameters,
        world_size=world_size,
        stage=zero.stage,
        precision=config.precision,
        micro_steps=packs,
        group_size=zero.hierarchical_partition_size,
    )


def _memory(config: TrainConfig, zero: ZeroConfig, parameters: int, world_size: int) -> MemoryPerRank:
    return memory_per_rank(
        parameters=parameters,
        world_size=world_size,
        stage=zero.stage,
        spec=config.model.flop_spec(),
        token_budget=config.token_budget,
        precision=config.precision,
        checkpointed_blocks=config.model.checkpointed_blocks(),
        bucket_elements=zero.bucket_elements,
        max_live_elements=zero.max_live_elements,
        group_size=zero.hierarchical_partition_size,
    )
