"""Report what a configuration would need at any number of ranks, without training: ``train/main.py --dry-run``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import product

import numpy as np

from flowception.config import dump
from flowception.data.plan import Plan
from flowception.errors import ConfigError, Problems
from flowception.nn.build import count_parameters
from flowception.nn.presets import AUTO
from flowception.ranges import integer, number
from flowception.shards.index import ClipIndex
from flowception.training.config import TrainConfig
from flowception.training.estimate.arrangements import (
    USABLE_SHARE,
    Arrangement,
    Job,
    answer,
    arrange,
    checkpointed_blocks,
    devices,
    rank_arrangements,
)
from flowception.training.estimate.memory import block_activations, checkpoint_bytes
from flowception.training.estimate.preflight import check_data, check_run
from flowception.training.estimate.step_time import DAY_S, Cluster
from flowception.training.hardware import GIB, PEAK_TFLOPS_BF16

_USUAL_WORLD_SIZES = (8, 64)
_USUAL_MEMORY_GB = "80,141"
_PEAK_GPU = "H100"


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions of a dry run that are not in the configuration."""

    world_sizes: str = ""
    """Comma-separated numbers of ranks; empty is the launched number, 8 and 64."""
    hfu: float = 0.4
    """Achieved share of the peak, with recomputation counted (hardware FLOPs utilization)."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one rank; None is ``logging.peak_tflops``, or the peak of an H100."""
    bandwidth_gb_per_s: float = 25.0
    """GB/s each way over one GPU's share of the network between nodes; 25 is half of a 400 Gb/s adapter per GPU."""
    inside_node_gb_per_s: float = 300.0
    """GB/s that a GPU sends to the other GPUs of its node; 300 is two thirds of NVLink 4 (450 each way)."""
    gpus_per_node: int = 8
    """GPUs per node, which share its network."""
    stage_3_block_ms: float = 1.0
    """Milliseconds per block and micro-step (forward and backward) that stage 3 waits for the host to gather and free
    weights. A guess: on a busy CPU core the host takes 16 ms more at stage 3, and part of that is hidden."""
    memory_gb_per_s: float = 3000.0
    """GB/s of device memory bandwidth, for the optimizer; 3000 is nine tenths of an H100's."""
    memory_gb: str = ""
    """Comma-separated memory sizes of devices in GB, as sold; empty is ``memory_gib``, or 80 (H100) and 141 (H200).
    Vendor GB are counted as GiB: an 80 GB H100 reports 79 GiB, a 141 GB H200 about 140 GiB."""
    clip: str | None = None
    """Latent frames x rows x columns of synthetic clips to plan with; None reads the shard set."""
    text_tokens: int = 0
    """Text tokens per synthetic clip."""
    num_clips: int = 20_000
    """Number of synthetic clips."""

    def __post_init__(self) -> None:
        number(above=0, at_most=1, note="a share, such as 0.4").check("--hfu", self.hfu)
        number(above=0, note="GB/s, such as 25").check("--bandwidth", self.bandwidth_gb_per_s)
        number(above=0, note="GB/s, such as 300").check("--inside-node", self.inside_node_gb_per_s)
        number(above=0, note="GB/s, such as 3000").check("--memory-bandwidth", self.memory_gb_per_s)
        number(at_least=0, note="0 is none").check("--stage-3-block-ms", self.stage_3_block_ms)
        integer(at_least=1).check("--gpus-per-node", self.gpus_per_node)
        number(above=0, note="such as 989").or_null("that of the device").check("--peak-tflops", self.peak_tflops)
        integer(at_least=1).check("--num-clips", self.num_clips)
        integer(at_least=0).check("--text-tokens", self.text_tokens)

    def index(self) -> ClipIndex | None:
        """Index of synthetic clips of the size ``clip``; None if the shard set is read."""
        if self.clip is None:
            return None
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", self.clip):
            raise ConfigError(f"--clip must be latent frames x rows x columns, such as 19x8x8, got {self.clip!r}")
        frames, height, width = map(int, self.clip.split("x"))
        lengths = np.full(self.num_clips, frames)
        return ClipIndex.from_arrays(frames=lengths, height=height, width=width, text_tokens=self.text_tokens)

    def devices_gb(self, config: TrainConfig) -> list[float]:
        """Memory sizes to rank for, in GB."""
        if not self.memory_gb and config.memory_gib is not None:
            return [config.memory_gib]
        text = self.memory_gb or _USUAL_MEMORY_GB
        try:
            found = [float(word) for word in text.split(",")]
        except ValueError:
            found = [0.0]
        if not all(0 < memory < float("inf") for memory in found):
            raise ConfigError(f"--memory-gb must be numbers > 0 (GB, such as {_USUAL_MEMORY_GB}), got {text!r}")
        return found

    def cluster(self, config: TrainConfig) -> tuple[Cluster, str]:
        """The assumed machines, and a note on their compute speed."""
        peak, source = self.peak_tflops, "as given"
        if peak is None:
            peak, source = config.logging.peak_tflops, "logging.peak_tflops"
        if peak is None:
            peak, source = PEAK_TFLOPS_BF16[_PEAK_GPU], f"{_PEAK_GPU}, dense bf16"
        cluster = Cluster(
            peak_tflops=peak,
            hfu=self.hfu,
            gpus_per_node=self.gpus_per_node,
            between_nodes_gb_per_s=self.bandwidth_gb_per_s,
            inside_node_gb_per_s=self.inside_node_gb_per_s,
            stage_3_block_ms=self.stage_3_block_ms,
            memory_gb_per_s=self.memory_gb_per_s,
        )
        return cluster, f"HFU {self.hfu:g} of {peak:g} TFLOP/s per rank ({source})"


def world_sizes(text: str) -> list[int]:
    """World sizes to report: those in ``text`` (comma-separated), or else the launched one, 8 and 64."""
    if not text:
        return sorted({int(os.environ.get("WORLD_SIZE", "1")), *_USUAL_WORLD_SIZES})
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ConfigError(f"--world-size must be integers >= 1 (such as 8,64), got {text!r}")
    return sizes


def report(config: TrainConfig, assumed: Assumptions) -> tuple[str, list[str]]:
    """Write the report.

    Args:
        config: The run.
        assumed: Assumptions that are not in the configuration.

    Returns:
        The text (resolved configuration, parameters, FLOPs, memory and days by world size, and the fastest sharding by
        device memory), and the problems that would stop the run, which are also in the text.
    """
    sizes, devices_gb, problems = world_sizes(assumed.world_sizes), assumed.devices_gb(config), Problems()
    index = assumed.index()
    plan = None
    if index is None:
        plan = check_data(config, problems)
    else:
        with problems.collected():
            plan = Plan(index, None, config.process, config.plan, config.model.spec(), config.seed)
    check_run(config, sizes if assumed.world_sizes else [], problems)
    parameters = count_parameters(config.model)
    job = Job.of(config, parameters, plan.mean_step_flops(0) if plan else 0.0)
    cluster, speed = assumed.cluster(config)
    columns = [_configured(config, job, cluster, size, devices_gb[0]) for size in sizes]
    lines = [
        dump(config).rstrip(),
        "",
        f"parameters: {parameters:,} ({parameters / 1e9:.3f} B)",
        f"checkpoint: {checkpoint_bytes(parameters) / 1e9:.2f} GB (weights, two moments and EMA in fp32); each rank "
        "holds a copy of its share in host memory to save in the background",
        *_plan_lines(config, plan, assumed),
        "",
        *_memory_table(config, job, columns, sizes, devices_gb[0]),
        "",
        *(_times(config, job, columns, sizes, cluster, speed) if plan else []),
        "",
        *(_ranking(config, job, cluster, sizes, devices_gb) if plan else []),
        *(f"problem {number}: {problem}" for number, problem in enumerate(problems.found, 1)),
        "dry run: nothing was started",
    ]
    return "\n".join(lines), problems.found


def _plan_lines(config: TrainConfig, plan: Plan | None, assumed: Assumptions) -> list[str]:
    if plan is None:
        return ["data: no plan (see the problems below); --clip 19x8x8 plans with clips of one size instead"]
    steps = plan.steps_in_epoch(0)
    flops = plan.mean_step_flops(0)
    data = (
        f"data: {len(plan.rows):,} clips, {steps:,} steps per epoch, {config.max_steps / steps:.2f} epochs in max_steps"
    )
    if assumed.clip is not None:
        text = f", each with {assumed.text_tokens} text tokens" if assumed.text_tokens else ""
        data = f"data: clips of {assumed.clip} latents assumed{text}, about {len(plan.rows) / steps:.0f} per step"
    return [
        data,
        f"FLOPs per step: {flops:.4g} forward and backward, mean of epoch 0, without recomputation",
    ]


def _configured(config: TrainConfig, job: Job, cluster: Cluster, world_size: int, memory_gb: float) -> Arrangement:
    """The configured arrangement; with ``auto`` recomputation it depends on the device memory."""
    blocks = checkpointed_blocks(job, config, world_size, memory_gb * GIB)
    return arrange(job, cluster, config.zero, world_size, blocks)


def _row(name: str, values: list[str]) -> str:
    return f"{name:<18}" + "".join(f"{value:>10}" for value in values)


def _memory_table(
    config: TrainConfig, job: Job, columns: list[Arrangement], sizes: list[int], memory_gb: float
) -> list[str]:
    kept, block_input = block_activations(job.spec, job.token_budget, job.precision, job.compiled)
    decided = f"; as few are recomputed as {memory_gb:.4g} GB allow" * (config.model.activation_checkpointing == AUTO)
    layers, packs = job.spec.num_layers, [job.packs(size) for size in sizes]
    lines = [
        f"memory per rank in GiB, {columns[0]}, {config.precision}, model.compile={job.compiled}, {layers} blocks; "
        f"a block that is not recomputed adds {(kept - block_input) / GIB:.2f}{decided}:",
        _row("ranks", [str(size) for size in sizes]),
        _row("packs per rank", ["refused" if number is None else str(number) for number in packs]),
        _row("blocks kept", [str(layers - column.checkpointed_blocks) for column in columns]),
    ]
    for part in [*vars(columns[0].memory), "total"]:
        values = [f"{getattr(column.memory, part) / GIB:.2f}" for column in columns]
        lines.append(_row(part.replace("_", " "), values))
    return lines


def _times(
    config: TrainConfig, job: Job, columns: list[Arrangement], sizes: list[int], cluster: Cluster, speed: str
) -> list[str]:
    """Step time and days of the full run. Ranks without a pack in the last micro-step of a step wait."""
    rows = {
        "compute, s": f"per step, at {speed}, recomputation included",
        "between nodes, GB": f"per step and GPU, {cluster.gpus_per_node} GPUs per node",
        "communication, s": f"per step, at {cluster.between_nodes_gb_per_s:g} GB/s per GPU between nodes and "
        f"{cluster.inside_node_gb_per_s:g} inside",
        "host, s": f"per step, at stage 3 {cluster.stage_3_block_ms:g} ms per block and pack",
        "optimizer, s": f"per step, at {cluster.memory_gb_per_s:g} GB/s of device memory",
        "days, overlapped": "if all communication overlaps with compute",
        "days, in sequence": "if none does",
        "MFU, in sequence": "what the log would show then",
    }
    values: list[list[str]] = []
    for column, size in zip(columns, sizes, strict=True):
        time = column.time
        if job.packs(size) is None:
            values.append(["refused"] * len(rows))
            continue
        days = [seconds * config.max_steps / DAY_S for seconds in (time.overlapped_s, time.sequential_s)]
        mfu = job.step_flops / (time.sequential_s * size * cluster.peak_tflops * 1e12)
        values.append(
            [f"{time.compute_s:.3f}", f"{column.between_nodes / 1e9:.2f}", f"{time.communication_s:.3f}"]
            + [f"{time.host_s:.3f}", f"{time.update_s:.3f}", f"{days[0]:.2f}", f"{days[1]:.2f}", f"{mfu:.3f}"]
        )
    return [_row(name, list(row)) + f"   {rows[name]}" for name, row in zip(rows, zip(*values), strict=True)]


def _ranking(config: TrainConfig, job: Job, cluster: Cluster, sizes: list[int], devices_gb: list[float]) -> list[str]:
    """Every sharding that fits, by estimated step time, and a one-sentence summary."""
    layers = job.spec.num_layers
    lines = [
        f"sharding options that fit {USABLE_SHARE:.0%} of a device's memory, fastest first (* as configured): GB "
        "that a rank sends per step, and its share of the traffic between nodes; seconds as above, without overlap:",
        f"{'':<26}{'blocks kept':>12}{'memory GiB':>12}{'gathered':>10}{'in group':>10}{'reduced':>10}{'crossing':>10}"
        f"{'step, s':>10}",
    ]
    answers = []
    for size, memory_gb in product([size for size in sizes if job.packs(size)], devices_gb):
        ranked = rank_arrangements(job, cluster, config.zero, size, memory_gb * GIB)
        lines.append(f"{devices(size, memory_gb)}:" + " none" * (not ranked))
        for found in ranked:
            mark = "*" if found.zero == config.zero else " "
            sent = [*vars(found.traffic).values(), found.between_nodes]
            lines.append(
                f"{mark} {found!s:<24}{layers - found.checkpointed_blocks:>12}{found.memory.total / GIB:>12.2f}"
                + "".join(f"{value / 1e9:>10.2f}" for value in sent)
                + f"{found.time.sequential_s:>10.3f}"
            )
        configured = _configured(config, job, cluster, size, memory_gb)
        answers.append(answer(ranked, configured, layers, size, memory_gb))
    return [*lines, "", *answers]
