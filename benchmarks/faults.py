"""Inject faults of many kinds into small training runs; each must end like an uninterrupted run.

    python benchmarks/faults.py --faults 200 --seed 0 --json training_faults.json --page training_faults.md

The faults are SIGKILL of a rank in every part of a step, at every file operation of a save, while loading and while
starting; damaged checkpoints; a full disk; preemption; leftovers of dead jobs; two jobs on one run directory; and other
numbers of ranks. After each fault the same command is repeated until the run is complete, and the result is compared
with an uninterrupted run. The exit code is 1 if any fault changed the result or needed manual work.

A small number of faults (``--faults 30``) is a sample with every kind; ``--seed day`` draws a different one each day.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts import each other as benchmarks.NAME

from flowception.files import write_atomically
from flowception.progress import Progress
from tests.faults.training.case_run import CaseRun, Record
from tests.faults.training.cases import ALL_SETTINGS, FEW_SETTINGS, ONE_SETTING, Case, Deck
from tests.faults.training.page import failures, page, table
from tests.faults.training.sabotage import SABOTAGES
from tests.faults.training.scene import SAVE_EVERY, STEPS, Scene

_FULL = 100
"""From this number of faults on, all numbers of ranks and ZeRO stages are drawn."""


def run_all(scene: Scene, cases: Sequence[Case]) -> list[Record]:
    """Run the cases one by one."""
    records, failed = [], 0
    with Progress(len(cases), "faults") as progress:
        for number, case in enumerate(cases):
            records.append(CaseRun(scene, case, scene.folder / f"fault-{number:04d}").run())
            failed += not records[-1].passed
            if not records[-1].passed:
                print(f"FAILED in fault-{number:04d}: {failures([asdict(records[-1])])[0]}", file=sys.stderr)
            progress.advance(note=f"{failed} failed; {case.kind}: {case.place}")
    return records


def uninterrupted_s(scene: Scene) -> float:
    """Seconds of an uninterrupted run on two ranks."""
    place = scene.folder / "timed"
    place.mkdir()
    start = time.monotonic()
    scene.run(place, 2, 3)
    return time.monotonic() - start


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--faults", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seed", default="0", metavar="S", help="a number, or day for a daily one (default: 0)")
    parser.add_argument("--kinds", default="", metavar="WORD", help="only kinds of fault whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record of every fault here")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the Markdown page here")
    parser.add_argument("--work", type=Path, metavar="DIR", help="empty folder to keep, to inspect failed cases")
    parser.add_argument("--sabotage", choices=sorted(SABOTAGES), help="resume wrongly on purpose; this must fail")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    arguments = parse(argv)
    seed = datetime.now(UTC).toordinal() if arguments.seed == "day" else int(arguments.seed)
    print(f"{arguments.faults} faults, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        scene = Scene(folder.resolve(), arguments.sabotage)
        try:
            plain_s = uninterrupted_s(scene)
            settings = ALL_SETTINGS if arguments.faults >= _FULL else FEW_SETTINGS
            deck = Deck(scene, random.Random(seed), ONE_SETTING if arguments.sabotage else settings)
            cases = [case for case in deck.draw(arguments.faults) if arguments.kinds in case.kind]
            records = [asdict(record) for record in run_all(scene, cases)]
        finally:
            scene.server.close()
        result: dict[str, Any] = {
            "seed": seed,
            "steps": STEPS,
            "save_every_steps": SAVE_EVERY,
            "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), 2 to 4 ranks over gloo",
            "uninterrupted_s": round(plain_s, 2),
            "seconds": round(time.monotonic() - start, 1),
            "records": records,
        }
    print(table(records))
    print("\n".join(failed := failures(records)) or "nothing failed")
    if arguments.json:
        write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    if arguments.page:
        json_word = f" --json {arguments.json}" if arguments.json else ""
        command = f"python benchmarks/faults.py --faults {arguments.faults} --seed {arguments.seed}{json_word}"
        write_atomically(arguments.page, page(result, command))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
