"""What a configuration would do, without starting anything: ``train/main.py --dry-run``."""

from __future__ import annotations

import os

from flowception.config import TrainConfig, dump
from flowception.errors import ConfigError, DataError
from flowception.nn.backbone import count_parameters
from flowception.training.dataset import open_data
from flowception.training.memory import MemoryPerRank, memory_per_rank

_USUAL_WORLD_SIZES = (8, 64)
_GIB = 2**30


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


def report(config: TrainConfig, sizes: list[int]) -> str:
    """The report as text.

    Args:
        config: The run.
        sizes: World sizes to estimate memory for.

    Returns:
        Resolved configuration, parameters, memory per rank by part, and steps per epoch.
    """
    try:
        plan = open_data(config).plan
        steps = plan.steps_in_epoch(0)
        epochs = config.max_steps / steps
        data_line = f"data: {len(plan.rows):,} clips, {steps:,} steps per epoch, {epochs:.2f} epochs in max_steps"
    except DataError as error:
        data_line = f"data not found: {error}"
    parameters = count_parameters(config.model)
    return "\n".join(
        [
            dump(config).rstrip(),
            "",
            f"parameters: {parameters:,} ({parameters / 1e9:.3f} B)",
            data_line,
            "",
            *_memory_table(config, parameters, sizes),
            "dry run: nothing was started",
        ]
    )


def _memory_table(config: TrainConfig, parameters: int, sizes: list[int]) -> list[str]:
    columns = {size: _memory(config, parameters, size) for size in sizes}
    checkpointing = "with" if config.model.activation_checkpointing else "without"
    lines = [
        f"memory per rank in GiB, ZeRO-{config.zero.stage}, {config.precision}, activations estimated {checkpointing} "
        "checkpointing:",
        f"{'ranks':<18}" + "".join(f"{size:>10}" for size in sizes),
        f"{'packs per rank':<18}" + "".join(f"{_packs(config, size):>10}" for size in sizes),
    ]
    for part in [*vars(next(iter(columns.values()))), "total"]:
        values = "".join(f"{getattr(memory, part) / _GIB:>10.2f}" for memory in columns.values())
        lines.append(f"{part.replace('_', ' '):<18}{values}")
    return lines


def _packs(config: TrainConfig, world_size: int) -> str:
    return str(-(-config.packs_per_step // world_size)) if config.packs_per_step >= world_size else "refused"


def _memory(config: TrainConfig, parameters: int, world_size: int) -> MemoryPerRank:
    return memory_per_rank(
        parameters=parameters,
        world_size=world_size,
        stage=config.zero.stage,
        spec=config.model.flop_spec(),
        token_budget=config.token_budget,
        precision=config.precision,
        activation_checkpointing=config.model.activation_checkpointing,
        bucket_elements=config.zero.bucket_elements,
        max_live_elements=config.zero.max_live_elements,
    )
