"""Twelve checks of the CUDA path in under nine minutes, offline; run by ``benchmarks/gpu.sh``.

    benchmarks/gpu.sh --device cpu                      # tests the script with a small network
    benchmarks/gpu.sh --json gpu.json --page gpu.md     # on a machine with one GPU

Each check runs in a separate process with a time limit and prints one line when it ends. Verdicts: ``pass``;
``measured``, figures without a pass criterion; ``needs a GPU``, with the reason; ``FAIL``, with what was wrong. The
JSON file is written after every check. The exit code is 1 if any check failed, and 2 if a GPU was requested but there
is none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts import each other as benchmarks.NAME

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.children import run_in_child
from benchmarks.gpu.outcome import FAIL, Check, CheckFailed, Outcome, Record
from benchmarks.gpu.table import CHECKS, CPU_PATIENCE, TOTAL_LIMIT_S
from flowception.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
EXIT_NO_GPU = 2
_IMPORTED_ONCE = (
    "torch",
    "flowception.config",
    "flowception.nn.dit",
    "flowception.training.trainer",
    "flowception.generation.kv_cache",
)
"""Modules that are slow to import and do not use the GPU; imported once, before checks are forked."""
_NO_TIME = "not run: the {total:g} s for all checks are used up or reserved for later ones; run it with --only {number}"


def run_check(check: Check, device: str, folder: Path, limit_s: float) -> Record:
    """Run one check in a child.

    Args:
        check: The check.
        device: ``cuda`` or ``cpu``.
        folder: Folder for its files.
        limit_s: Time limit in seconds.

    Returns:
        Its record. A check that crashed or was killed is a failure with its partial results.
    """
    place = folder / f"check_{check.number:02d}"
    place.mkdir()
    found, log = place / "outcome.json", place / "log"
    ending = run_in_child(partial(_be_check, check, device, place, found), limit_s, log)
    noted = Outcome.read(found)
    if ending.code == 0 and noted is not None:
        outcome = noted
    else:
        before = f" (before: {noted.summary})" if noted is not None else ""
        outcome = Outcome(FAIL, ending.reason(limit_s) + before, noted.figures if noted is not None else {})
    return Record(check.number, check.name, round(ending.seconds, 1), outcome)


def _be_check(check: Check, device: str, place: Path, found: Path) -> None:
    """Run a check in the child process."""
    from benchmarks.gpu.scene import Scene

    module, function = check.function.split(":")
    try:
        outcome = getattr(importlib.import_module(module), function)(Scene.of(device, place))
    except CheckFailed as error:
        outcome = Outcome(FAIL, str(error), error.figures)
    outcome.save(found)


def find_machine(device: str, folder: Path) -> dict[str, Any]:
    """Describe the machine, from a child process so that this process does not initialize CUDA.

    Raises:
        SystemExit: If the device does not exist.
    """
    found, log = folder / "machine.json", folder / "machine.log"
    ending = run_in_child(partial(_write_machine, device, found), 120, log)
    if not found.is_file():
        raise SystemExit(f"benchmarks/gpu: cannot query the machine ({ending.reason(120)}); check that torch works")
    machine: dict[str, Any] = json.loads(found.read_text())
    if device == "cuda" and machine["card"] is None:
        print("benchmarks/gpu: torch finds no GPU; use --device cpu to test the script", file=sys.stderr)
        raise SystemExit(EXIT_NO_GPU)
    return machine


def _write_machine(device: str, found: Path) -> None:
    import platform

    import torch

    card = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None
    machine = {
        "device": device,
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if card else None,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    write_atomically(found, json.dumps(machine))


def run_all(
    checks: Sequence[Check],
    device: str,
    machine: dict[str, Any],
    json_path: Path | None,
    folder: Path,
    budget: Budget,
    logs: Path | None = None,
) -> list[Record]:
    """Run checks in order. Prints a line and writes the JSON file after each; keeps failed checks' logs in ``logs``."""
    records: list[Record] = []
    for number, check in enumerate(checks):
        limit_s = budget.limit_s(check, checks[number + 1 :])
        if limit_s > 0:
            records.append(run_check(check, device, folder, limit_s))
        else:
            reason = _NO_TIME.format(total=budget.total_s, number=check.number)
            records.append(Record(check.number, check.name, 0.0, Outcome(FAIL, reason)))
        print(records[-1].line(), flush=True)
        if logs is not None and records[-1].outcome.verdict == FAIL and limit_s > 0:
            keep_log(folder / f"check_{check.number:02d}", logs / f"check_{check.number:02d}.log")
        if json_path is not None:
            write_json(json_path, machine, records, budget.used_s, len(records) == len(CHECKS))
    return records


def keep_log(place: Path, target: Path) -> None:
    """Concatenate the output of a check and its children into one file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"== {log.name}\n{log.read_text(errors='replace')}" for log in sorted(place.rglob("*log"))]
    target.write_text("\n".join(parts))


def write_json(path: Path, machine: dict[str, Any], records: Sequence[Record], seconds: float, complete: bool) -> None:
    """Write the results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        **machine,
        "complete": complete,
        "seconds": round(seconds, 1),
        "checks": [asdict(record) for record in records],
    }
    write_atomically(path, json.dumps(result, indent=2) + "\n")


def default_json(machine: dict[str, Any]) -> Path:
    """Default file for a GPU's result, named by card and date."""
    card = re.sub(r"[^a-z0-9]+", "-", str(machine["card"]).lower().replace("nvidia", "")).strip("-")
    return ROOT / "benchmarks" / "results" / f"gpu_{card}_{machine['date']}.json"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the script with a small network"
    )
    parser.add_argument("--json", type=Path, help="file for the figures (cuda: benchmarks/results/gpu_CARD_DATE.json)")
    parser.add_argument("--page", type=Path, help="file for the page made from them, such as docs/gpu.md")
    parser.add_argument("--logs", type=Path, help="folder for the output of failed checks")
    parser.add_argument("--only", help="numbers of checks, such as 1,3")
    arguments = parser.parse_args(words)
    numbers = {check.number for check in CHECKS}
    try:
        only = {int(word) for word in arguments.only.split(",")} if arguments.only else numbers
    except ValueError:
        only = {0}
    if only - numbers:
        parser.error(f"--only must be numbers from 1 to {len(CHECKS)}, such as 1,3, got {arguments.only!r}")
    arguments.checks = [check for check in CHECKS if check.number in only]
    return arguments


def import_once() -> None:
    """Import the slow modules, so that forked children have them. The environment check reports missing ones."""
    for name in _IMPORTED_ONCE:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"benchmarks/gpu: {name} cannot be imported: {error}", file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run, print, write.

    Returns:
        0, or 1 if a check failed.
    """
    arguments = parse_arguments(words)
    budget = Budget(TOTAL_LIMIT_S, 1.0 if arguments.device == "cuda" else CPU_PATIENCE, time.monotonic)
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # synchronizing threads are slow on a busy machine
    import_once()
    with tempfile.TemporaryDirectory(prefix="flowception-gpu-") as name:
        machine = find_machine(arguments.device, Path(name))
        path = arguments.json
        if path is None and arguments.device == "cuda" and len(arguments.checks) == len(CHECKS):
            path = default_json(machine)
        records = run_all(arguments.checks, arguments.device, machine, path, Path(name), budget, arguments.logs)
    if arguments.page is not None:
        from benchmarks.gpu.page import page

        result = {**machine, "checks": [asdict(record) for record in records]}
        write_atomically(arguments.page, page([result]))
    return int(any(record.outcome.verdict == FAIL for record in records))


if __name__ == "__main__":
    sys.exit(main())
