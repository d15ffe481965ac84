"""The paper's claims at toy scale, with equal data, network and training FLOPs, over several seeds.

    python benchmarks/claims/run.py --budget quick|full --out DIR

(a) Insertion order: learned, left to right, hierarchical, random. (b) Flowception, full-sequence, and autoregressive
with causal or full attention. (c) Attention windows of 1, 2 and 4 frames and full attention, Flowception against
full-sequence. Each arm uses the regular trainer and sampler, and is scored by the toy world's laws. By default,
``claims.json``, one plot per claim and ``claims.md`` are written to DIR. Running the command again continues: results
that exist in DIR are not recomputed.

Runs are distributed over ``--workers`` processes, each with one arm and seed at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as benchmarks.NAME

from benchmarks.claims.arms import ARMS, BUDGETS, Arm
from benchmarks.claims.page import page, table
from benchmarks.claims.pictures import draw
from benchmarks.claims.training import Study, run_arm
from benchmarks.claims.verdicts import judge_claims
from benchmarks.claims.world import make_data, references
from flowception.errors import ConfigError, FlowceptionError
from flowception.files import write_atomically


def _start_worker() -> None:
    """Make a worker a single-rank job with a separate port, regardless of how the study was started."""
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    os.environ.pop("MASTER_PORT", None)
    import torch

    torch.set_num_threads(1)


def _work(study: Study, name: str, seed: int) -> list[dict[str, Any]]:
    """Run one arm in a worker process."""
    from flowception.training.distributed.launch import init_distributed

    return run_arm(study, ARMS[name], seed, init_distributed())


def run_all(study: Study, arms: Sequence[Arm], seeds: Sequence[int], workers: int) -> list[dict[str, Any]]:
    """Run all arms without results, printing a line for each finished arm.

    Args:
        study: The study.
        arms: Arms to run, longest first.
        seeds: Seeds to run.
        workers: Number of processes.

    Returns:
        All results.
    """
    jobs = [(arm, seed) for arm in arms for seed in seeds]
    pending = [(arm, seed) for arm, seed in jobs if not study.is_done(arm, seed)]
    print(f"{len(jobs)} runs, {len(jobs) - len(pending)} of them done before, in {study.folder}", flush=True)
    start = time.monotonic()
    if pending:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(pending)), context, initializer=_start_worker) as pool:
            futures = {pool.submit(_work, study, arm.name, seed): (arm, seed) for arm, seed in pending}
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    arm, seed = futures[future]
                    _report(number, len(pending), arm, seed, future.result(), time.monotonic() - start)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    paths = [study.result_path(name, seed) for arm, seed in jobs for name in arm.results()]
    return [json.loads(path.read_text()) for path in paths]


def _report(number: int, total: int, arm: Arm, seed: int, results: list[dict[str, Any]], elapsed_s: float) -> None:
    first, error_px = results[0], results[0]["trajectory_error_px"]
    print(
        f"[{number}/{total}] {arm.name} seed {seed}: {first['steps']} steps, "
        f"trajectory error {'-' if error_px is None else f'{error_px:.2f} px'}, "
        f"cpu {sum(result['cpu_s'] for result in results):.0f} s; {elapsed_s / 60:.1f} min elapsed",
        flush=True,
    )


def by_name(results: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by name and seed."""
    named: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        named.setdefault(result["name"], {})[result["seed"]] = result
    return named


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="The paper's claims at toy scale.")
    parser.add_argument("--budget", choices=list(BUDGETS), default="quick")
    parser.add_argument("--out", type=Path, help="folder of the study (default: runs/claims-BUDGET)")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), help="only these arms; claims that need others are skipped"
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: claims.json in --out")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="default: --out")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: claims.md in --out")
    return parser.parse_args(arguments)


def study_of(folder: Path, name: str) -> Study:
    """Open the study in a folder, or start a new one.

    Raises:
        ConfigError: If the folder contains a study of another budget.
    """
    budget, path = BUDGETS[name], folder / "budget.json"
    text = json.dumps({"budget": name, **asdict(budget)}, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.read_text() != text:
        raise ConfigError(f"{folder} contains a study of another budget (see its budget.json); choose another --out")
    write_atomically(path, text)
    return Study(folder, budget)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, judge the claims and write the results.

    Returns:
        0; 2 for bad input.
    """
    options = parse_arguments(arguments)
    folder = options.out or Path("runs") / f"claims-{options.budget}"
    arms = [arm for arm in ARMS.values() if options.arms is None or arm.name in options.arms]
    try:
        study = study_of(folder, options.budget)
        make_data(study.data, study.budget.data_clips)
        seeds = range(study.budget.seeds)
        results = run_all(study, arms, seeds, options.workers)
    except FlowceptionError as error:
        print(f"claims: error: {error}", file=sys.stderr)
        return 2
    named = by_name(results)
    report = {
        "budget": options.budget,
        **asdict(study.budget),
        "device": results[0]["device"],
        "cpu_s": sum(result["cpu_s"] for result in results),
        "references": references(study.budget.sampled_clips),
        "claims": judge_claims(named, seeds),
        "results": results,
    }
    outputs = (options.json or folder / "claims.json", options.page or folder / "claims.md")
    pictures = options.pictures or folder
    for path in (*(output.parent for output in outputs), pictures):
        path.mkdir(parents=True, exist_ok=True)
    write_atomically(outputs[0], json.dumps(report, indent=1) + "\n")
    links = {letter: os.path.relpath(path, outputs[1].parent) for letter, path in draw(named, pictures).items()}
    write_atomically(outputs[1], page(report, named, links))
    print(table(named, list(named)))
    for claim in report["claims"]:
        print(f"({claim['letter']}) {claim['verdict']}: {claim['claim']}")
    print(f"wrote {outputs[0]} and {outputs[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
