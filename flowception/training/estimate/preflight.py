"""Find all problems that would stop a run, without starting it (``train/main.py --dry-run``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flowception import run_directory
from flowception.checkpoint.format import list_steps
from flowception.data.pack import check_widths
from flowception.data.plan import Plan
from flowception.data.step_plan import check_world_size
from flowception.errors import Problems, require
from flowception.nn import flash
from flowception.nn.build import count_parameters
from flowception.shards.open import open_reader
from flowception.training.config import TrainConfig
from flowception.training.data import training_plan
from flowception.training.metrics import check_packages
from flowception.training.resume import no_initial_weights


def check_data(config: TrainConfig, problems: Problems) -> Plan | None:
    """Collect all problems with the data of a run.

    Args:
        config: The run; if ``model.in_channels`` is None, it is set from the shard set.
        problems: Problems found are added here.

    Returns:
        The plan of the training split; None if it cannot be made.
    """
    reader = None
    with problems.collected():
        reader = open_reader(config.data)
    if reader is None:
        return None
    if config.model.in_channels is None:
        config.model = replace(config.model, in_channels=reader.latent_channels)
    with problems.collected():
        run_directory.check_codec(config.run_dir, reader.meta)
    with problems.collected():
        run_directory.check(config.run_dir, run_directory.identity(config.model, reader.meta))
    with problems.collected():
        weights = _initial_weights(config)
        if weights is not None and list_steps(weights):
            run_directory.check_codec(weights, reader.meta, new_is_fine=False)
    with problems.collected():
        check_widths(config.model.spec(), reader)
    with problems.collected():
        return training_plan(config, reader)
    return None


def check_run(config: TrainConfig, world_sizes: Sequence[int], problems: Problems) -> None:
    """Collect all other problems: incompatible sizes, missing packages and missing checkpoints.

    Args:
        config: The run.
        world_sizes: Numbers of ranks to check.
        problems: Problems found are added here.
    """
    with problems.collected():
        count_parameters(config.model)
    for world_size in world_sizes:
        with problems.collected():
            check_world_size(config.plan.packs_per_step, world_size)
        with problems.collected():
            config.zero.check_world_size(world_size)
        with problems.collected():
            config.profile.check_world_size(world_size)
    with problems.collected():
        check_packages(config.logging)
    with problems.collected():
        require("deepspeed")
    if config.model.attention_backend == "flash":
        with problems.collected():
            flash.check_installed()
    with problems.collected():
        weights = _initial_weights(config)
        if weights is not None and not list_steps(weights):
            raise no_initial_weights(weights)


def _initial_weights(config: TrainConfig) -> str | None:
    """Return ``init_from``, or None if the run already has a checkpoint, because then it is not read."""
    return None if list_steps(config.run_dir) else config.init_from
