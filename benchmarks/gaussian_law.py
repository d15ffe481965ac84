"""Error of the sampler on correlated frames with an exact oracle, by number of steps and insertion rule.

Clips of 2 or 5 frames, each with probability 1/2, correlation 0.8 between neighbors (AR(1)), one start frame. The
oracle (``flowception.evaluation.oracles.gaussian``) returns the exact velocity and rates, so the remaining error is the
sampler's: total variation for the lengths, and Fréchet distance from the closed form for the frames of each length::

    python benchmarks/gaussian_law.py --json gaussian_law.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from flowception.evaluation.frechet import sample_frechet_distance, sampling_frechet_distance
from flowception.evaluation.lengths import length_histogram, sampling_total_variation, total_variation
from flowception.evaluation.oracles.gaussian import GaussianClips, GaussianOracle
from flowception.flow import SamplerConfig, sample
from flowception.flow.insertion import INSERTION_RULES

LAW = GaussianClips(lengths={2: 0.5, 5: 0.5}, correlation=0.8, num_start_frames=1)


def measure(rule: str, num_steps: int, clips: int, seed: int = 0) -> dict[str, object]:
    """Measure one row: distances of lengths and frames, and their noise floors with true samples."""
    start = time.perf_counter()
    config = SamplerConfig(num_inference_steps=num_steps, num_start_frames=LAW.num_start_frames, insertion=rule)
    oracle = GaussianOracle(LAW, config.schedule())
    result = sample(oracle, frame_shape=(1, 1, 1), batch_size=clips, config=config, seed=seed)
    sizes = result.cu_frames.diff()
    row: dict[str, object] = {
        "rule": rule,
        "num_inference_steps": num_steps,
        "clips": clips,
        "total_variation": total_variation(length_histogram(sizes.tolist()), LAW.lengths),
        "sampling_total_variation": sampling_total_variation(LAW.lengths, clips),
    }
    for length in LAW.lengths:
        which = torch.nonzero(sizes == length).flatten()
        frames = result.frames.flatten()[result.cu_frames[which][:, None] + torch.arange(length)]
        covariance = LAW.covariance(length)
        row[f"frechet_distance_{length}"] = sample_frechet_distance(frames, LAW.mean(length), covariance)
        row[f"sampling_frechet_distance_{length}"] = sampling_frechet_distance(covariance, len(frames))
    return row | {"seconds": time.perf_counter() - start}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table of ``docs/oracles.md``, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rules", nargs="+", choices=list(INSERTION_RULES), default=["thinning", "bernoulli"])
    parser.add_argument("--steps", nargs="+", type=int, default=[25, 50, 100, 200])
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    rows = []
    names = ("total_variation", "frechet_distance_2", "frechet_distance_5")
    print(f"| rule | steps | {' | '.join(names)} |\n|---|---|---|---|---|")
    for rule in options.rules:
        for steps in options.steps:
            row = measure(rule, steps, options.clips, options.seed)
            rows.append(row)
            cells = " | ".join(f"{row[name]:.4f} ({row[f'sampling_{name}']:.4f})" for name in names)
            print(f"| {rule} | {steps} | {cells} |", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
