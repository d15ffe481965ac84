"""Compare the lengths of generated clips with the length law given their context: the table of docs/tasks.md.

    python benchmarks/task_lengths.py --config configs/demo.yaml configs/demo_mixture.yaml --generated demo/tasks

For clips of the toy world, whose length law is known. The context carries information about the length, so the law of a
clip is ``p(n) p(context | n)``, normalized (``flow.context_law``), and the law of a folder is the mean over its clips.
Lengths below the number of initial frames are excluded, since the sampler never removes frames.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowception.evaluation.lengths import length_histogram, sampling_total_variation, total_variation
from flowception.evaluation.toy.world import LENGTH_LAW
from flowception.flow import TASK_NUMBERS, ProcessConfig, Role, length_law
from flowception.training.config import load_config


def given_of(record: Mapping[str, Any]) -> list[Role]:
    """The context of a clip, as roles for ``context_law``.

    Args:
        record: A line of ``clips.jsonl``.
    """
    roles = [Role[name.upper()] for name in record["roles"]]
    context: list[Role] = [role for role in roles if role in (Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE)]
    return [Role.START, *context] if record["task"] == "completion" and roles[0] == Role.START else context


def expected_law(records: Sequence[Mapping[str, Any]], process: ProcessConfig) -> dict[int, float]:
    """Mean length law of the clips of one task."""
    expected: dict[int, float] = {}
    for record in records:
        least = sum(name != "free" for name in record["roles"])
        lengths = {n: share for n, share in LENGTH_LAW.items() if n >= least}
        for n, share in length_law(record["task"], given_of(record), lengths, process).items():
            expected[n] = expected.get(n, 0.0) + share / len(records)
    return expected


def measure(folder: Path, process: ProcessConfig) -> dict[str, Any]:
    """Measure one output folder of ``flowception generate``."""
    records = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    expected = expected_law(records, process)
    lengths = [record["latent_frames"] for record in records]
    return {
        "task": records[0]["task"],
        "clips": len(records),
        "mean_expected": sum(n * share for n, share in expected.items()),
        "mean_frames": sum(lengths) / len(lengths),
        "total_variation": total_variation(length_histogram(lengths), expected),
        "sampling_total_variation": sampling_total_variation(expected, len(lengths)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print one row per task that has a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", nargs="+", required=True, help="configuration of the run that generated the clips")
    parser.add_argument("--generated", type=Path, required=True, help="folder with one folder per task")
    options = parser.parse_args(arguments)
    config = load_config(options.config)
    print(
        "| task | clips | mean length by the law | generated | total variation | of sampling alone |\n"
        + "|---" * 6
        + "|"
    )
    for task in TASK_NUMBERS:
        if (options.generated / task / "clips.jsonl").is_file():
            row = measure(options.generated / task, config.process)
            print(
                f"| `{task}` | {row['clips']} | {row['mean_expected']:.2f} | {row['mean_frames']:.2f} "
                f"| {row['total_variation']:.2f} | {row['sampling_total_variation']:.2f} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
