"""Write the claims study as tables and a page: fixed prose, with all numbers and verdicts from the results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims.arms import EQUAL_FLOW_FRAMES, FLOWCEPTION, WINDOWS, result_name
from benchmarks.claims.verdicts import DOES_NOT_HOLD, DRIFT, FRECHET, HOLDS, TRAJECTORY, Results, judge

LENGTH = "length_total_variation"
SHOWN = {
    "a": (FLOWCEPTION, "left_to_right", "hierarchical", "random"),
    "b": (
        FLOWCEPTION,
        "full_sequence",
        "autoregressive_causal",
        "autoregressive_full",
        result_name("autoregressive_causal", EQUAL_FLOW_FRAMES),
        result_name("autoregressive_full", EQUAL_FLOW_FRAMES),
    ),
    "c": tuple(
        name + window for name in (FLOWCEPTION, "full_sequence") for window in ("", *(f"_window_{k}" for k in WINDOWS))
    ),
}
TITLES = {"a": "Insertion order", "b": "Flowception, full-sequence, autoregressive", "c": "Attention windows"}


def values_of(results: Results, name: str, metric: str) -> list[float]:
    """Values of a metric, one per seed; nan where undefined."""
    found = [result[metric] for result in results[name].values()]
    return [math.nan if value is None else float(value) for value in found]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error, which is nan for a single seed."""
    known = np.asarray(values, dtype=np.float64)
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan
    return float(known.mean()), error


def _cell(results: Results, name: str, metric: str, digits: int) -> str:
    mean, error = mean_and_error(values_of(results, name, metric))
    return "-" if math.isnan(mean) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(results: Results, names: Sequence[str]) -> str:
    """Make a Markdown table of results: means over seeds and their standard errors."""
    lines = [
        "| | steps | training FLOPs | flow frames | clips | trajectory error, px | drift, px per frame "
        "| Frechet, px² | length TV |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        spent = [mean_and_error(values_of(results, name, key))[0] for key in ("steps", "training_flops", "flow_frames")]
        clips = mean_and_error(values_of(results, name, "trained_clips"))[0]
        scores = [
            _cell(results, name, metric, digits) for metric, digits in ((TRAJECTORY, 3), (DRIFT, 4), (FRECHET, 2))
        ]
        lengths = _cell(results, name, LENGTH, 2)
        lines.append(
            f"| {name.replace('_', ' ')} | {spent[0]:,.0f} | {spent[1]:.3g} | {spent[2]:,.0f} | {clips:,.0f} | "
            + " | ".join([*scores, lengths])
            + " |"
        )
    return "\n".join(lines)


def page(report: Mapping[str, Any], results: Results, pictures: Mapping[str, str]) -> str:
    """Make the page.

    Args:
        report: The content of ``claims.json``.
        results: The results by name and seed.
        pictures: Links to plots by letter of the claim.

    Returns:
        Markdown.
    """
    parts = [_opening(report, results), _summary(report), _method(report)]
    for letter, names in SHOWN.items():
        if letter not in pictures:
            continue
        parts += [f"## ({letter}) {TITLES[letter]}", f"![{TITLES[letter]}]({pictures[letter]})", table(results, names)]
        if letter == "b":
            parts.append(_drifting(results, names))
        parts += [_claim(claim) for claim in report["claims"] if claim["letter"] == letter]
    return "\n\n".join([*parts, _LIMITS]) + "\n"


_LIMITS = """## Limitations

* A frame of this world is almost determined by the two before it. This favors left-to-right order and autoregression,
  and there is no long context to compress, which the paper gives as the reason for Flowception's gain.
* Clips have 6 to 10 frames, so errors can hardly accumulate, and a window of 4 frames covers nearly the full clip.
* Only Flowception also learns how many frames are missing, with the same network and FLOPs.
* The comparisons of a claim share seeds and arms, so they are not independent, and a claim with many comparisons fails
  more easily than one with few."""


def _drifting(results: Results, names: Sequence[str]) -> str:
    """List the arms that drift: drift is a signed slope, negative if the error decreases along the clip."""
    found = [name for name in names if judge(name, values_of(results, name, DRIFT)).verdict == HOLDS]
    listed = ", ".join(name.replace("_", " ") for name in found) or "none"
    return (
        f"Arms that drift, with the entire 90 % interval of their slope above 0: {listed}. A negative slope means that "
        "the error decreases along the clip."
    )


def _opening(report: Mapping[str, Any], results: Results) -> str:
    any_result = next(iter(next(iter(results.values())).values()))
    where = "on CPU cores, no GPU" if report["device"] == "cpu" else f"on {report['device']}"
    return f"""# The paper's claims at toy scale

This page, verdicts included, is generated by this command:

```
python benchmarks/claims/run.py --budget {report["budget"]} --page docs/claims.md --pictures docs/images --json \\
    benchmarks/results/claims.json
```

Budget `{report["budget"]}`, {where}: {report["seeds"]} seeds, {any_result["parameters"]:,} parameters, \
{report["training_flops"]:.3g} training FLOPs per run, {report["cpu_s"] / 60:.0f} minutes of CPU time in total.
This is little training: "not decided" means only that, and no verdict applies to the scale of the paper. Use
`--budget full` for more."""


def _summary(report: Mapping[str, Any]) -> str:
    comparisons = sum(len(claim["comparisons"]) for claim in report["claims"])
    lines = [
        "## Which claims hold",
        "",
        "| | claim | verdict | comparisons: hold, do not hold, total |",
        "|---|---|---|---|",
    ]
    for claim in report["claims"]:
        found = [comparison["verdict"] for comparison in claim["comparisons"]]
        counts = f"{found.count(HOLDS)}, {found.count(DOES_NOT_HOLD)}, {len(found)}"
        lines.append(f"| {claim['letter']} | {claim['claim']} | **{claim['verdict']}** | {counts} |")
    return (
        "\n".join(lines)
        + f"""

The rule (`benchmarks/claims/verdicts.py`): a comparison is one metric of a baseline against Flowception, paired by
seed. It holds if the 90 % confidence interval of the mean difference (Student's t over seeds) is on Flowception's side
of zero, does not hold if it is on the other side, and is not decided otherwise. A claim holds if all its comparisons
hold, and does not hold if one of them does not. Without any true difference, about {0.05 * comparisons:.0f} of these
{comparisons} comparisons would be decided each way by chance."""
    )


def _method(report: Mapping[str, Any]) -> str:
    return f"""## Setup

The data is the motion of the toy world (`flowception/evaluation/toy/world.py`): a point that moves 1.5 px per frame
between walls 8 px apart and is reflected, in clips of 6 to 10 frames. A frame is the position itself, one latent of two
channels, so a network generates the true state. All arms share the data ({report["data_clips"]:,} clips), the network,
the learning rate, and the number of training FLOPs up to one step (forward and backward of visible tokens, counted from
the plan by `flowception/packing/flops.py`). One frame is a start frame, all others are inserted. Autoregression trains
one frame per clip and pass, so it is also measured after as many frames with a velocity loss as Flowception, at several
times its FLOPs. All arms use the regular trainer and sampler, with {report["sampled_clips"]} sampled clips and
{report["num_inference_steps"]} steps per frame. Only Flowception chooses its lengths; the others receive lengths drawn
from the true law and have no length error.

{_metrics(report["references"])}

Tables show means over seeds ± their standard error."""


def _metrics(references: Mapping[str, Mapping[str, float]]) -> str:
    """Table of the metrics, with their values for real clips and for independent random positions."""
    rows = (
        (
            "trajectory error, px",
            TRAJECTORY,
            3,
            "root-mean-square distance of 6 consecutive frames from the nearest trajectory of the world",
        ),
        ("drift, px per frame", DRIFT, 4, "slope of that error over the clip, on 4 consecutive frames"),
        ("Frechet, px²", FRECHET, 2, "distance of mean and covariance of a clip's last 6 positions from the true ones"),
        ("length TV", LENGTH, 2, "total variation from the true length law; random clips have true lengths"),
    )
    lines = ["| metric | definition | real clips | independent random frames |", "|---|---|---|---|"]
    for title, metric, digits, words in rows:
        real, noise = (references[name][metric] for name in ("real", "independent_frames"))
        lines.append(f"| {title} | {words} | {real:.{digits}f} | {noise:.{digits}f} |")
    return "\n".join(lines)


def _claim(claim: Mapping[str, Any]) -> str:
    lines = [
        f"**{claim['claim']}** Verdict: **{claim['verdict']}**.",
        "",
        "| difference, positive if Flowception is better | mean | 90 % interval | seeds better | verdict |",
        "|---|---|---|---|---|",
    ]
    for found in claim["comparisons"]:
        words = found["words"]
        if found["mean"] is None:
            lines.append(f"| {words} | - | - | - | {found['verdict']} |")
            continue
        lines.append(
            f"| {words} | {found['mean']:.4g} | {found['low']:.4g} to {found['high']:.4g} "
            f"| {found['seeds_better']} of {found['seeds']} | {found['verdict']} |"
        )
    return "\n".join(lines)
