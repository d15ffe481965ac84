"""The results of the faults benchmark as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_ORDER = ("SIGKILL", "damaged", "disk", "preemption", "left-overs", "second", "other")


def _kinds(records: Sequence[Mapping[str, Any]]) -> list[str]:
    def place(kind: str) -> tuple[int, str]:
        return next((i for i, word in enumerate(_ORDER) if kind.startswith(word)), len(_ORDER)), kind

    return sorted({record["kind"] for record in records}, key=place)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each kind of fault, and a total."""
    head = (
        "| fault | faults | ranks | resumed at steps | mismatches | manual steps | other failures | seconds, median |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    rows = [_row(kind, [record for record in records if record["kind"] == kind]) for kind in _kinds(records)]
    return "\n".join([head, *rows, _row("all", records)])


def _row(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    sizes = sorted({size for record in records for size in record["world_sizes"]})
    steps = sorted({step for record in records for step in record["resumed_steps"] if step is not None})
    counts = [
        sum(bool(record["mismatches"]) for record in records),
        sum(record["manual_steps"] for record in records),
        sum(bool(record["unexpected"]) for record in records),
    ]
    cells = [name, len(records), _range(sizes), _range(steps), *counts, f"{_seconds(records):.1f}"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _range(values: Sequence[int]) -> str:
    if not values:
        return "none"
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _seconds(records: Sequence[Mapping[str, Any]]) -> float:
    return median(record["seconds"] for record in records)


def failures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each failed case."""
    lines = []
    for record in records:
        problems = [*record["mismatches"], *record["unexpected"]]
        if record["manual_steps"]:
            problems.append(f"{record['manual_steps']} manual steps")
        if problems:
            where = f"ranks {record['world_sizes']}, ZeRO {record['stages']}, exit codes {record['exit_codes']}"
            lines.append(f"{record['kind']}: {record['place']} ({where}): {'; '.join(problems)}")
    return lines


def page(result: Mapping[str, Any], command: str) -> str:
    """The page ``docs/training_faults.md``."""
    records, plain = result["records"], result["uninterrupted_s"]
    changed = [record["loss_difference"] for record in records if record["kind"] == "other world size"]
    bound = f"{max(changed):.1e}" if changed else "not measured"
    lines = failures(records)
    return f"""# Training faults

<!-- Written by benchmarks/faults.py. -->

    {command}

injects {len(records)} faults into runs of a toy model and repeats the same command until each run is complete. A run
has {result["steps"]} steps, saves every {result["save_every_steps"]} steps, and includes several epochs, warm-up and
held-out losses. It is then compared with an uninterrupted run. At the same number of ranks, the weights, EMA and
optimizer state of the last checkpoint, the loss of every step, and the keys and content of every pack must be
bit-identical. (This is on a CPU. CUDA sums some gradients in no fixed order, so even two uninterrupted runs differ
there in the last bits.) At a different number of ranks, the packs must be the same and the losses within 1e-4 relative;
the largest difference was {bound}.

{table(records)}

A mismatch is a difference from the uninterrupted run. A manual step is a start of the unchanged command, without a
fault, that did not complete the run. Other failures: a fault did not happen, an exit code was not as documented, a run
did not resume from the newest good checkpoint, or more steps were lost than two save intervals. SIGKILL during a save
is sent before every system operation of both ranks of a two-rank run, and in the middle of every write.

{chr(10).join(f"- {line}" for line in lines) if lines else "Nothing failed."}

{result["machine"]}; {result["seconds"] / 60:.0f} minutes in total. An uninterrupted run takes {plain:.1f} s on two
ranks that are forked from a process with everything imported. The ranks are on one machine, so the benchmark covers
neither network failures nor disks that lose confirmed writes. With `--sabotage moments` (or `ema`, `cursor`, `verify`)
every resume is wrong on purpose, and the benchmark must fail.
"""
