"""Writes ``docs/gpu.md`` from GPU results: forecasts next to measurements, or only forecasts if there is no result.

python benchmarks/gpu/page.py                # all of benchmarks/results/gpu_*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts import each other as benchmarks.NAME

from benchmarks.gpu.forecasts import ASSUMED, CHANGES, PARTS, PEAK_TFLOPS, PEERS
from benchmarks.gpu.table import CHECKS
from flowception.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
NOT_YET = "not yet run"

Result = Mapping[str, Any]


def read_results() -> list[Result]:
    """The newest GPU result of each card in the repository."""
    newest: dict[str, Result] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("gpu_*.json")):
        result: Result = json.loads(path.read_text())
        if result["device"] == "cuda":
            kept = newest.get(result["card"])
            newest[result["card"]] = result if kept is None or result["date"] >= kept["date"] else kept
    return list(newest.values())


def page(results: Sequence[Result]) -> str:
    """``docs/gpu.md``.

    Args:
        results: Results of ``benchmarks/gpu.sh``, one per machine.
    """
    return "\n\n".join([_head(results), _checks(results), _recipe(results), _parts(results), _counting()]) + "\n"


def _title(result: Result) -> str:
    if result["device"] != "cuda":
        return f"CPU, small network (torch {result['torch']})"
    return f"{result['card']} (torch {result['torch']}, {result['date']})"


def _head(results: Sequence[Result]) -> str:
    on_gpu = [result for result in results if result["device"] == "cuda"]
    if not results:
        status = f"**{NOT_YET.capitalize()}:** no GPU was available. All figures are forecasts."
    elif not on_gpu:
        status = "**Not a GPU:** this page is from a test of the script on a CPU; its figures do not apply to GPUs."
    else:
        status = "Run on: " + "; ".join(map(_title, on_gpu)) + "."
        unfinished = [_title(result) for result in on_gpu if len(result["checks"]) < len(CHECKS)]
        if unfinished:
            status += " Not all checks were run on: " + "; ".join(unfinished) + "."
    return f"""# On a GPU

<!-- Written by benchmarks/gpu/page.py. -->

    bash benchmarks/gpu.sh                  # one H100 or H200, offline, under nine minutes
    bash benchmarks/gpu.sh --device cpu     # tests the script with a small network
    bash benchmarks/gpu.sh --json PATH --page PATH --logs FOLDER    # on a temporary machine

{status}

Each of the twelve checks runs in a separate process with a time limit and prints one line. The result is written to
`benchmarks/results` as JSON, named by card and date; `python benchmarks/gpu/page.py` makes this page from it. **On a
temporary machine, results in the repository are lost:** pass `--json`, `--page` and `--logs` paths that are copied
back, and put the JSON file into `benchmarks/results` before making the page. For an offline machine with missing
packages, run `bash benchmarks/gpu_wheels.sh` on a machine with internet access first."""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _found(result: Result, number: int) -> Mapping[str, Any] | None:
    """The outcome of a check, if it was run."""
    return next((record["outcome"] for record in result["checks"] if record["number"] == number), None)


def _checks(results: Sequence[Result]) -> str:
    titles = [_title(result) for result in results] or ["result"]
    rows = [f"| | check | what it does | {' | '.join(map(_escape, titles))} |", "|---" * (3 + len(titles)) + "|"]
    for check in CHECKS:
        cells = []
        for result in results:
            outcome = _found(result, check.number)
            cells.append(NOT_YET if outcome is None else f"**{outcome['verdict']}**: {_escape(outcome['summary'])}")
        rows.append(f"| {check.number} | {check.name} | {check.what} | {' | '.join(cells or [NOT_YET])} |")
    return "## The checks\n\n" + "\n".join(rows)


def _arm(result: Result, name: str | None) -> Mapping[str, Any]:
    outcome = _found(result, 10) or {"figures": {}}
    found: Mapping[str, Any] = outcome["figures"].get("arms", {}).get(name, {})
    return found


def _arm_cell(result: Result, name: str | None) -> str:
    arm = _arm(result, name)
    blocks = f", {arm['checkpointed_blocks']} of {arm['layers']} blocks checkpointed" if "layers" in arm else ""
    if "out_of_memory" in arm:
        return f"out of memory{blocks}"
    if "ms_per_pack" not in arm:
        return NOT_YET
    mfu = f", {_percent(arm['mfu'])}" if "mfu" in arm else ""
    return (
        f"{arm['ms_per_pack']:.0f} ms{mfu}{blocks}; {arm['peak_gib']:.1f} GiB of {arm['estimated_gib']:.1f} estimated"
    )


def _recipe(results: Sequence[Result]) -> str:
    titles = [f"measured, {_title(result)}" for result in results] or ["measured"]
    rows = [
        f"| | forecast, H200 | forecast with change 3 | {' | '.join(map(_escape, titles))} |",
        "|---" * (3 + len(titles)) + "|",
    ]
    for change in CHANGES:
        cell = CELLS.get(change.number, partial(_arm_cell, name=change.arm))
        cells = [cell(result) for result in results] or [NOT_YET]
        rows.append(
            f"| {change.number}. {change.name} | {change.ms_per_pack:.0f} ms, {_percent(change.mfu)} | "
            f"{change.ms_with_change_3:.0f} ms | "
            f"{' | '.join(cells)} |"
        )
    return f"""## The recipe: milliseconds per pack

`configs/t2v_2b.yaml` at ZeRO-3 on one GPU: forward and backward of one pack of 16,384 tokens, and MFU relative to
{PEAK_TFLOPS:g} TFLOP/s by exact FLOPs (below). Each row includes the changes above it; all measurements include change
3. In rows without checkpointing, as few blocks are checkpointed as the dry run's estimate allows on the card, and the
cell states the number. The forecast is a roofline without checkpointing in these rows. It assumes
{ASSUMED}.

{chr(10).join(rows)}

Excluded are the optimizer, which runs once per step, and communication, because one GPU has none. The EMA is excluded
here and from the dry run's estimate."""


def _segments_cell(result: Result) -> str:
    """Savings of change 3 in attention, from check 7."""
    figures = (_found(result, 7) or {"figures": {}})["figures"]
    static, tight = figures.get("FA2 static"), figures.get("FA2 tight")
    if not static or not tight:
        return NOT_YET
    saved = [static[name] - tight[name] for name in ("forward_ms", "backward_ms")]
    return f"in all rows; alone it saves {saved[0]:.2f} + {saved[1]:.2f} ms a block (check 7)"


def _kernel_cell(result: Result) -> str:
    """Savings of FlashAttention-3, from check 7."""
    figures = (_found(result, 7) or {"figures": {}})["figures"]
    ours, theirs = figures.get("FA2 tight"), figures.get("FA3 tight")
    if not figures:
        return NOT_YET
    if not ours or not theirs or "refused" in theirs:
        return f"not measured: FA3 {figures.get('kernels', {}).get('FA3', 'refused')}"
    saved = [ours[name] - theirs[name] for name in ("forward_ms", "backward_ms")]
    return f"saves {saved[0]:.2f} + {saved[1]:.2f} ms a block (check 7)"


CELLS = {3: _segments_cell, 4: _kernel_cell}
"""Changes measured by check 7, by number."""


def _block_ms(result: Result, part: str) -> str:
    """Measured milliseconds of a part of a block, from check 6."""
    figures = (_found(result, 6) or {"figures": {}})["figures"]
    calls = {"modulate": 2, "add_gated": 2, "norm_and_rotate": 2, "swiglu": 1}
    if part == "matrix products" and "products" in figures:
        found = list(figures["products"].values())
        weights = [1] * len(found)
    elif part.startswith("attention, ") and "attention" in figures:
        found, weights = [figures["attention"]], [1]
    elif part.startswith("elementwise") and "leaves" in figures:
        way = "eager" if "eager" in part else "compiled"
        found, weights = [figures["leaves"][f"{name} {way}"] for name in calls], list(calls.values())
    else:
        return NOT_YET if not figures else "see check 7"
    forward, backward = (
        sum(weight * each[name] for weight, each in zip(weights, found, strict=True))
        for name in ("forward_ms", "backward_ms")
    )
    return f"{forward:.2f} + {backward:.2f}"


def _parts(results: Sequence[Result]) -> str:
    titles = [f"measured, {_title(result)}" for result in results] or ["measured"]
    rows = [f"| | forecast, H200 | {' | '.join(map(_escape, titles))} |", "|---" * (2 + len(titles)) + "|"]
    for part in PARTS:
        cells = [_block_ms(result, part.name) for result in results] or [NOT_YET]
        rows.append(f"| {part.name} | {part.forward_ms:.2f} + {part.backward_ms:.2f} | {' | '.join(cells)} |")
    return "## One block: milliseconds forward + backward\n\n" + "\n".join(rows)


def _counting() -> str:
    rows = "\n".join(f"| {name} | {_percent(share)} | {source} |" for name, share, source in PEERS)
    return f"""## How FLOPs are counted

MFU is the model's FLOPs divided by the time and the card's dense bfloat16 peak, {PEAK_TFLOPS:g} TFLOP/s for an H100 or
H200 (`training/hardware.py`). Clocks are not locked.

* **Exact** (`packing/flops.py`), used above: the actual multiplications for visible frames and their text. Linear
  layers per token, modulation per frame, `4 d n^2` for a layer's attention in a segment of n tokens, times three for
  forward and backward. Padding and recomputation are excluded.
* **As others count** (`mfu_peers` in the JSON): `6 N` per token, with N the block weights that act on every token, and
  `12 d n^2` per layer for attention, forward and backward. N excludes modulation, which is half of all weights but acts
  once per frame instead of once per token. `6 N` with all weights would be 1.8 times the actual multiplications.

| published | share of {PEAK_TFLOPS:g} TFLOP/s | |
|---|---|---|
{rows}

None of these packs only visible frames, and each counts FLOPs differently."""


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/page.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, nargs="*", help="results (default: benchmarks/results/gpu_*.json)")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write (default: docs/gpu.md)")
    arguments = parser.parse_args()
    results = read_results() if arguments.json is None else [json.loads(path.read_text()) for path in arguments.json]
    write_atomically(arguments.page, page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
