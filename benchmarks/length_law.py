"""Error of the sampler in the laws of lengths and gaps with exact rates, by insertion rule and number of steps.

Clips are content-free. An oracle (``flowception.evaluation.oracles.content_free``) replaces the network and returns the
exact posterior mean of the number of missing frames, from the network's inputs. The remaining error is that of the
insertion rule (docs/method.md)::

    python benchmarks/length_law.py --json length_law.json --picture length_law.png

A case is a law of lengths, or keyframes with a law of the number of missing frames in each gap. For gaps, the distance
is that of their joint law.

Shape legend: ``B`` clips, ``F`` frames of all clips.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flowception.evaluation.lengths import sampling_total_variation, total_variation
from flowception.evaluation.oracles.content_free import ContentFreeOracle, LengthLaw
from flowception.flow import Context, SamplerConfig, SampleResult, is_context, sample
from flowception.flow.insertion import INSERTION_RULES

Outcome = tuple[int, ...]
"""Frames of each segment of a clip (a keyframe and the frames after it), or the length of a clip without context."""


def uniform(*lengths: int) -> dict[int, float]:
    """Uniform law over some lengths."""
    return {n: 1 / len(lengths) for n in lengths}


def geometric(first: int, last: int, ratio: float) -> dict[int, float]:
    """``p(n) ~ ratio^n`` from ``first`` to ``last``."""
    weights = {n: ratio**n for n in range(first, last + 1)}
    return {n: weight / sum(weights.values()) for n, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """The laws to sample from."""

    laws: Sequence[LengthLaw]
    """Law of the number of frames of each segment."""
    start_frames: int = 3
    """Number of start frames, not counting context."""
    context: bool = False
    """Whether each segment starts with an active keyframe. Start frames are then possible only in clips of one
    segment."""

    def truth(self) -> dict[Outcome, float]:
        """The joint law of the segments, which are independent."""
        items = itertools.product(*(law.items() for law in self.laws))
        return {tuple(n for n, _ in pairs): math.prod(p for _, p in pairs) for pairs in items}

    def longest(self) -> int:
        """Maximum number of frames of a clip."""
        return sum(max(law) for law in self.laws)


CASES: dict[str, Case] = {
    "uniform {15, 20, 25, 30}": Case(laws=[uniform(15, 20, 25, 30)]),
    "fixed 19": Case(laws=[uniform(19)]),
    "bimodal {8, 40}": Case(laws=[uniform(8, 40)]),
    "uniform 4 to 19": Case(laws=[uniform(*range(4, 20))]),
    "geometric 4 to 40": Case(laws=[geometric(4, 40, 0.9)]),
    "image, no start frame": Case(laws=[uniform(15, 20, 25, 30)], start_frames=0, context=True),
    "gaps of 3, 0, 7": Case(laws=[uniform(4), uniform(1), uniform(8)], start_frames=0, context=True),
    "gaps of 0, 3 or 8": Case(laws=[uniform(1, 4, 9)] * 3, start_frames=0, context=True),
}


def sample_case(case: Case, rule: str, num_steps: int, clips: int, *, seed: int = 0) -> SampleResult:
    """Sample clips of one value per frame with the real sampler and exact rates.

    Args:
        case: Laws to sample from.
        rule: Insertion rule.
        num_steps: Steps from clock 0 to 1.
        clips: Number of clips.
        seed: Seed of the first clip.

    Returns:
        The sampler's result.
    """
    present = case.start_frames + case.context
    if any(min(law) < present for law in case.laws):
        raise ValueError(f"every segment must have at least its {present} initial frames, got {case.laws}")
    config = SamplerConfig(
        num_inference_steps=num_steps,
        num_start_frames=case.start_frames,
        insertion=rule,
        max_frames=4 * case.longest(),
    )
    oracle = ContentFreeOracle(case.laws, config.schedule(), present)
    keyframes = torch.zeros(len(case.laws), 1, 1, 1)
    context = Context(frames=keyframes, active=[True] * len(keyframes)) if case.context else None
    return sample(oracle, frame_shape=(1, 1, 1), batch_size=clips, config=config, context=[context] * clips, seed=seed)


def outcomes(result: SampleResult, segments: int) -> list[Outcome]:
    """Outcome of each sampled clip."""
    starts = is_context(result.roles)
    starts[result.cu_frames[:-1]] = True
    frames = torch.nonzero(starts).flatten().diff(append=result.cu_frames[-1:])
    return [tuple(row) for row in frames.view(-1, segments).tolist()]


def measure(case: Case, rule: str, num_steps: int, clips: int, seed: int = 0) -> dict[str, object]:
    """Measure one row: total variation, histogram of outcomes, and cost."""
    start = time.perf_counter()
    result = sample_case(case, rule, num_steps, clips, seed=seed)
    counts = Counter(outcomes(result, len(case.laws)))
    histogram = {outcome: counts[outcome] / clips for outcome in sorted(counts)}
    return {
        "rule": rule,
        "num_inference_steps": num_steps,
        "total_variation": total_variation(histogram, case.truth()),
        "sampling_total_variation": sampling_total_variation(case.truth(), clips),
        "clips": clips,
        "evaluations": result.evaluations,
        "capped_clips": int(result.capped.sum()),
        "seconds": time.perf_counter() - start,
        "histogram": {" ".join(map(str, outcome)): share for outcome, share in histogram.items()},
    }


def draw_picture(rows: list[dict], path: Path) -> None:
    """Plot total variation against steps: a panel per case, a line per rule, the noise floor dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(INSERTION_RULES, ("#3b76af", "#d1495b", "#e1a93b"), strict=True))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.0 * columns, 2.6 * lines), squeeze=False, sharex=True, sharey=True
    )
    smallest = 1e-4
    for panel, case in itertools.zip_longest(axes.flat, cases):
        if case is None:
            panel.set_visible(False)
            continue
        of_case = [row for row in rows if row["case"] == case]
        for rule in dict.fromkeys(row["rule"] for row in of_case):
            line = sorted(
                (row["num_inference_steps"], row["total_variation"]) for row in of_case if row["rule"] == rule
            )
            steps, distances = zip(*line, strict=True)
            panel.plot(steps, [max(smallest, d) for d in distances], "o-", ms=3, color=colors[rule], label=rule)
        panel.axhline(max(smallest, of_case[0]["sampling_total_variation"]), color="gray", lw=0.8, ls="--")
        panel.set(xscale="log", yscale="log", ylim=(0.8 * smallest, 1))
        panel.set_xticks(steps, map(str, steps))
        panel.minorticks_off()
        panel.set_title(case, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel("steps to clock 1", fontsize=8)
    for panel in axes[:, 0]:
        panel.set_ylabel("total variation (0 drawn at 1e-4)", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower left", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_table(rows: list[dict]) -> None:
    """Print the Markdown table of ``docs/oracles.md``: one line per case and number of steps."""
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    print(f"| law | steps | {' | '.join(rules)} | sampling alone |\n|---|---|{'---|' * (len(rules) + 1)}")
    cells: dict[tuple[str, int], Mapping[str, float]] = {}
    floors = {row["case"]: row["sampling_total_variation"] for row in rows}
    for row in rows:
        key = row["case"], row["num_inference_steps"]
        cells[key] = {**cells.get(key, {}), row["rule"]: row["total_variation"]}
    for (case, steps), by_rule in cells.items():
        print(f"| {case} | {steps} | {' | '.join(f'{by_rule[rule]:.3f}' for rule in rules)} | {floors[case]:.3f} |")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rules", nargs="+", choices=list(INSERTION_RULES), default=list(INSERTION_RULES))
    parser.add_argument("--steps", nargs="+", type=int, default=[25, 50, 100, 200])
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--picture", type=Path, help="file for the plot")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the results."""
    options = parse_arguments(arguments)
    rows: list[dict] = []
    for case in options.cases:
        for steps in options.steps:
            for rule in options.rules:
                row = {"case": case, **measure(CASES[case], rule, steps, options.clips, options.seed)}
                rows.append(row)
                print(f"{case}, {rule}, {steps} steps: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
    print_table(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
