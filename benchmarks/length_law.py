"""How well the sampler keeps the length law, by insertion rule and number of steps, with exact rates.

Content-free clips: an oracle stands where the network stands and gives the exact posterior mean of the number of
missing frames. What is left is the error of the insertion rule itself (DESIGN.md section 2, "Sampler")::

    python benchmarks/length_law.py --json length_law.json --picture length_law.png

The posterior. Given n, a clip has 1 frame at its left end and n - 1 others in exchangeable order, ``s - 1`` of them
start frames (all, where there are fewer) and the rest free, each visible with probability ``kappa``. So seeing v
frames at clock t has likelihood ``Binomial(v - s; n - s, kappa(t))``, and each of the v gaps holds the same number of
missing frames in expectation, ``(E[n | v] - v) / v``.

Shape legend: ``B`` clips, ``F`` frames of all clips, ``L`` lengths of the law, ``V`` visible counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception.evaluation.lengths import length_histogram, sampling_total_variation, total_variation
from flowception.flow import SamplerConfig, SampleResult, SamplerState, sample
from flowception.flow.insertion import INSERTION_RULES
from flowception.flow.schedule import InsertionSchedule

LENGTH_LAWS: dict[str, dict[int, float]] = {
    "uniform {15, 20, 25, 30}": {n: 1 / 4 for n in (15, 20, 25, 30)},
    "fixed 19": {19: 1.0},
    "bimodal {8, 40}": {8: 1 / 2, 40: 1 / 2},
    "uniform 4 to 19": {n: 1 / 16 for n in range(4, 20)},
}


class ContentFreeOracle:
    """Exact rates of text-to-video clips whose frames say nothing about the length."""

    def __init__(self, law: Mapping[int, float], schedule: InsertionSchedule, num_start_frames: int) -> None:
        """Bind the law of lengths, the schedule, and the number of start frames that clips are sampled with."""
        self.lengths = np.array(sorted(law), dtype=np.int64)
        self.log_prior = np.log(np.array([law[n] for n in self.lengths.tolist()]))
        self.schedule = schedule
        self.starts = np.minimum(self.lengths, max(1, num_start_frames))

    def rate_table(self, clock: float, max_visible: int) -> NDArray[np.float64]:
        """Rate of each gap by number of visible frames.

        Args:
            clock: t, in [0, 1).
            max_visible: Largest number of visible frames.

        Returns:
            [V + 1], entry v for v visible frames; 0 where v is impossible.
        """
        kappa = float(self.schedule.kappa(torch.tensor(clock, dtype=torch.float64)))
        visible = torch.arange(max_visible + 1, dtype=torch.float64)[:, None]
        free, seen = torch.from_numpy(self.lengths - self.starts), visible - torch.from_numpy(self.starts)
        hidden = free - seen
        possible = (seen >= 0) & (hidden >= 0) & ((seen == 0) | (kappa > 0))
        inside, outside = seen.clamp(min=0), hidden.clamp(min=0)
        choose = torch.lgamma(free + 1.0) - torch.lgamma(inside + 1) - torch.lgamma(outside + 1)
        k = torch.tensor(kappa, dtype=torch.float64)
        log_joint = choose + torch.xlogy(inside, k) + torch.xlogy(outside, 1 - k) + torch.from_numpy(self.log_prior)
        posterior = torch.softmax(torch.where(possible, log_joint, -torch.inf), dim=1).nan_to_num(0.0)
        mean_missing = (posterior * outside).sum(dim=1)
        return (mean_missing / visible[:, 0].clamp(min=1)).numpy()

    def __call__(self, state: SamplerState) -> tuple[Tensor, Tensor]:
        """Predictor: no velocity, exact rates."""
        visible = state.clip_frames
        clock = float(state.clock[0])
        if clock >= 1:
            return torch.zeros_like(state.frames), torch.zeros(len(state.frames), dtype=torch.float64)
        table = torch.from_numpy(self.rate_table(clock, int(visible.max())))
        return torch.zeros_like(state.frames), table[visible][state.frame_clip]


def sample_lengths(
    law: Mapping[int, float], rule: str, num_steps: int, clips: int, *, num_start_frames: int = 3, seed: int = 0
) -> SampleResult:
    """Sample clips of one value per frame with the real sampler and exact rates.

    Args:
        law: Probability of each length.
        rule: Insertion rule.
        num_steps: Steps from clock 0 to 1.
        clips: Number of clips.
        num_start_frames: Start frames; no length may be below it.
        seed: Seed of the first clip.

    Returns:
        The sampler's result.
    """
    if min(law) < num_start_frames:
        raise ValueError(f"the law has clips of {min(law)} frames, fewer than num_start_frames = {num_start_frames}")
    config = SamplerConfig(
        num_inference_steps=num_steps, num_start_frames=num_start_frames, insertion=rule, max_frames=4 * max(law)
    )
    oracle = ContentFreeOracle(law, config.schedule(), num_start_frames)
    return sample(oracle, frame_shape=(1, 1, 1), batch_size=clips, config=config, seed=seed)


def measure(law: Mapping[int, float], rule: str, num_steps: int, clips: int, seed: int = 0) -> dict[str, object]:
    """One row of the table: total variation of the sampled lengths, their law, and what it took."""
    began = time.perf_counter()
    result = sample_lengths(law, rule, num_steps, clips, seed=seed)
    histogram = length_histogram(result.cu_frames.diff().tolist())
    return {
        "rule": rule,
        "num_inference_steps": num_steps,
        "total_variation": total_variation(histogram, law),
        "sampling_total_variation": sampling_total_variation(law, clips),
        "clips": clips,
        "evaluations": result.evaluations,
        "capped_clips": int(result.capped.sum()),
        "seconds": time.perf_counter() - began,
        "histogram": {str(n): share for n, share in histogram.items()},
    }


def draw_picture(rows: list[dict], path: Path) -> None:
    """True and sampled length laws, one row of panels for each law, one column for each rule and number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    laws = list(dict.fromkeys(row["law"] for row in rows))
    runs = list(dict.fromkeys((row["num_inference_steps"], row["rule"]) for row in rows))
    figure, axes = plt.subplots(
        len(laws), len(runs), figsize=(2.6 * len(runs), 2.1 * len(laws)), squeeze=False, sharex="row", sharey="row"
    )
    for row in rows:
        panel = axes[laws.index(row["law"])][runs.index((row["num_inference_steps"], row["rule"]))]
        truth, seen = LENGTH_LAWS[row["law"]], {int(n): share for n, share in row["histogram"].items()}
        panel.bar(list(seen), list(seen.values()), width=0.9, color="#3b76af", label="sampled")
        panel.scatter(list(truth), list(truth.values()), s=10, color="#d1495b", zorder=3, label="true")
        panel.set_title(
            f"{row['rule']}, {row['num_inference_steps']} steps\nTV {row['total_variation']:.3f}", fontsize=8
        )
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel_row, law in zip(axes, laws, strict=True):
        panel_row[0].set_ylabel(law, fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("frames", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower left", ncols=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--laws", nargs="+", choices=list(LENGTH_LAWS), default=list(LENGTH_LAWS))
    parser.add_argument("--rules", nargs="+", choices=list(INSERTION_RULES), default=list(INSERTION_RULES))
    parser.add_argument("--steps", nargs="+", type=int, default=[25, 50])
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--picture", type=Path, help="draw the histograms here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse_arguments(arguments)
    rows: list[dict] = []
    print(f"{'length law':<26}{'rule':<11}{'steps':>5}{'TV':>9}{'(floor)':>9}{'seconds':>9}")
    for law in options.laws:
        for steps in options.steps:
            for rule in options.rules:
                row = {"law": law, **measure(LENGTH_LAWS[law], rule, steps, options.clips, options.seed)}
                rows.append(row)
                print(
                    f"{law:<26}{rule:<11}{steps:>5}{row['total_variation']:>9.4f}"
                    f"{row['sampling_total_variation']:>9.4f}{row['seconds']:>9.1f}",
                    flush=True,
                )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
