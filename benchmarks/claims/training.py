"""One run of the claims study: train, sample, and score by the toy world's laws.

Everything is resumable: an existing result is not recomputed, and a killed run continues from its last measured
point.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.claims.arms import (
    ARMS,
    EQUAL_FLOPS,
    FLOWCEPTION,
    Arm,
    Budget,
    Spent,
    arm_config,
    result_name,
    spend,
)
from benchmarks.claims.world import real_tracks, score, to_positions
from flowception.evaluation.toy.world import LENGTH_LAW
from flowception.files import write_atomically
from flowception.flow import SamplerConfig, sample
from flowception.flow.delays import build_delay_law
from flowception.generation.load import find_checkpoint, load_network
from flowception.generation.predictor import NetworkPredictor
from flowception.shards.schema import NO_CLASS
from flowception.training.config import TrainConfig
from flowception.training.data import open_data
from flowception.training.distributed.collectives import Ranks
from flowception.training.signals import StopFlag
from flowception.training.trainer import train

SAMPLING_SEED_STRIDE = 1_000_000


@dataclass(frozen=True)
class Study:
    """Folder and budget of a study."""

    folder: Path
    budget: Budget

    @property
    def data(self) -> Path:
        """The shard set that all arms train on."""
        return self.folder / "data"

    def run_dir(self, arm: Arm, seed: int) -> Path:
        """Run directory of an arm."""
        return self.folder / "runs" / f"{arm.name}-seed{seed}"

    def result_path(self, name: str, seed: int) -> Path:
        """File of a result."""
        return self.folder / "results" / f"{name}-seed{seed}.json"

    def config(self, arm: Arm, seed: int, max_steps: int = 1) -> TrainConfig:
        """Configuration of an arm's run."""
        return arm_config(arm, self.budget, seed, self.data, self.run_dir(arm, seed), max_steps)

    def is_done(self, arm: Arm, seed: int) -> bool:
        """Whether all results of an arm exist."""
        return all(self.result_path(name, seed).is_file() for name in arm.results())

    def spent_at(self, arm: Arm, seed: int, point: str) -> Spent:
        """Cost of an arm at a measurement point, from its plan and, for flow frames, from Flowception's."""
        plan = open_data(self.config(arm, seed)).plan
        if point == EQUAL_FLOPS:
            return spend(plan, point, self.budget.training_flops)
        return spend(plan, point, self.spent_at(ARMS[FLOWCEPTION], seed, EQUAL_FLOPS).flow_frames)


def run_arm(study: Study, arm: Arm, seed: int, ranks: Ranks) -> list[dict[str, Any]]:
    """Train, sample and score one arm at its measurement points; the training log goes to ``train.log``.

    Args:
        study: The study.
        arm: The arm.
        seed: Seed of weights, order, draws and sampling.
        ranks: A single rank, this process.

    Returns:
        Results of the arm, also written to the folder of the study.
    """
    results = []
    for point in arm.measured_at:
        path = study.result_path(result_name(arm.name, point), seed)
        if not path.is_file():
            result = _measure(study, arm, seed, point, ranks)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(result, indent=1) + "\n")
        results.append(json.loads(path.read_text()))
    return results


def _measure(study: Study, arm: Arm, seed: int, point: str, ranks: Ranks) -> dict[str, Any]:
    spent = study.spent_at(arm, seed, point)
    config = study.config(arm, seed, spent.steps)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    start, start_cpu = time.perf_counter(), time.process_time()
    with (run_dir / "train.log").open("a") as log, contextlib.redirect_stdout(log):
        train(config, ranks, StopFlag())
    trained = time.perf_counter()
    model = load_network(find_checkpoint(run_dir, spent.steps), config.model, ranks.device)
    law = build_delay_law(config.process.delay_law)
    tracks, evaluations = sample_tracks(model, config, study.budget, seed)
    sampled = time.perf_counter()
    return {
        "name": result_name(arm.name, point),
        "arm": arm.name,
        "measured_at_equal": point,
        "seed": seed,
        **spent._asdict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "chooses_length": law.inserts,
        "evaluations": evaluations,
        **score(tracks, law.inserts),
        "train_s": trained - start,
        "sample_s": sampled - trained,
        "cpu_s": time.process_time() - start_cpu,
        "device": str(torch.cuda.get_device_name()) if ranks.device.type == "cuda" else "cpu",
    }


def sample_tracks(
    model: nn.Module, config: TrainConfig, budget: Budget, seed: int
) -> tuple[list[NDArray[np.float64]], int]:
    """Sample clips; if the law does not choose lengths, use lengths from the true law, the same for every arm.

    Args:
        model: The network.
        config: Configuration of the run.
        budget: Number of clips and steps.
        seed: Seed of the run.

    Returns:
        Positions in pixels, [n, 2] per clip, and the number of evaluations.
    """
    chooses_length = build_delay_law(config.process.delay_law).inserts
    settings = SamplerConfig(
        num_inference_steps=budget.num_inference_steps,
        num_start_frames=config.process.num_start_frames,
        order="learned" if chooses_length else config.process.delay_law,
        max_frames=4 * max(LENGTH_LAW),
    )
    clips = budget.sampled_clips
    result = sample(
        NetworkPredictor(model, [NO_CLASS] * clips),
        frame_shape=(2, 1, 1),
        batch_size=clips,
        config=settings,
        num_frames=None if chooses_length else sorted(len(track) for track in real_tracks(clips)),
        seed=SAMPLING_SEED_STRIDE * (1 + seed),
        device=next(model.parameters()).device,
    )
    return [to_positions(clip) for clip in result.clips()], result.evaluations
