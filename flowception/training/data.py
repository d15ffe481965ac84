"""Training and held-out clips of a configuration: the shard set, its split, and the plans."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from flowception import run_directory
from flowception.data.pack import check_widths
from flowception.data.plan import Plan
from flowception.data.step_plan import PackPlan
from flowception.flow.delays import build_delay_law
from flowception.flow.extended_time import expected_attention_ratio
from flowception.shards.open import DataReader, open_reader
from flowception.shards.reader import ClipReader
from flowception.training.config import TrainConfig

logger = logging.getLogger(__name__)

VALIDATION_SEED = 0
_RATE_SAMPLE_CLIPS = 4096


@dataclass
class TrainingData:
    """The data of a run."""

    reader: DataReader
    plan: Plan
    """Plan of the training split, with no clip quarantined."""
    heldout_rows: NDArray[np.int64]


def open_data(config: TrainConfig) -> TrainingData:
    """Open the shard set of a configuration and plan its training split.

    Data that cannot be trained on is rejected here, before anything is built or written.

    Args:
        config: The run; if ``model.in_channels`` is None, it is set from the shard set.

    Returns:
        Reader, plan and held-out rows.

    Raises:
        FlowceptionError: If the set is missing or empty, does not match the configuration, or was encoded with a
            different codec than the run in ``run_dir`` started with.
    """
    reader = open_reader(config.data)
    run_directory.check_codec(config.run_dir, reader.meta)
    if config.model.in_channels is None:
        config.model = replace(config.model, in_channels=reader.latent_channels)
    check_widths(config.model.spec(), reader)
    _, heldout_rows = reader.index.split(config.data.heldout_fraction)
    return TrainingData(reader, training_plan(config, reader), heldout_rows)


def training_plan(config: TrainConfig, reader: DataReader) -> Plan:
    """Plan of the training split.

    Raises:
        FlowceptionError: If there are no clips, or one is longer than a pack or has a class that the network lacks.
    """
    rows, _ = reader.index.split(config.data.heldout_fraction)
    null = _null_text_tokens(reader)
    return Plan(
        reader.index, rows, config.process, config.plan, config.model.spec(), config.seed, null_text_tokens=null
    )


def heldout_plan(config: TrainConfig, data: TrainingData) -> Plan:
    """Plan of the held-out split. Its seed is fixed, so runs with different seeds can be compared."""
    index, null, spec = data.reader.index, _null_text_tokens(data.reader), config.model.spec()
    rows, process = data.heldout_rows, config.process
    return Plan(index, rows, process, config.plan, spec, VALIDATION_SEED, null_text_tokens=null)


def _null_text_tokens(reader: ClipReader) -> int:
    return 0 if reader.null_text is None else len(reader.null_text)


def mean_log_rate(plan: Plan) -> float:
    """Log of the mean number of missing frames per insertion site: the initial value of the rate head."""
    rows = plan.rows[:: max(1, len(plan.rows) // _RATE_SAMPLE_CLIPS)].astype(np.int64)
    draws = plan.clip_draws(PackPlan(0, 0, rows, np.arange(len(rows)))).clips
    weight = torch.where(draws.insertion_mask, draws.weight[:, None], 0.0)
    missing, sites = float((weight * draws.missing).sum()), float(weight.sum())
    return math.log(missing / sites) if missing > 0 and sites > 0 else 0.0


def mean_attention_ratio(config: TrainConfig, plan: Plan) -> float:
    """Expected attention ratio of a step, over the clips of a plan."""
    frames = plan.index.clips["frames"][plan.rows].astype(np.int64)
    return expected_attention_ratio(config.process, frames, plan.index.tokens_per_frame[plan.rows])


def log_what_is_not_used(config: TrainConfig, data: TrainingData) -> None:
    """Log parts of the data or the process that the run does not use, which may be intended or an oversight."""
    text_width = data.reader.text_width
    if text_width is not None and data.plan.spec.text_dim is None:
        text = "the model does not use the text of the shard set; set model.text_dim=%d to use it"
        logger.info(text, text_width)
    if build_delay_law(config.process.delay_law).two_part and config.process.insertion_share == 1:
        logger.info(
            "insertion_share is 1: states after the end of the clock are not trained, which is a different objective"
        )
