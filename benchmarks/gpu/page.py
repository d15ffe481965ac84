"""Makes ``docs/gpu.md`` from the results of GPUs: forecast beside measured, or forecasts alone without a result.

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
    """Every result of a GPU in the repository; of several of one card the newest."""
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
        results: What ``benchmarks/gpu.sh`` wrote, one for each machine.
    """
    return "\n\n".join([_head(results), _checks(results), _recipe(results), _parts(results), _counting()]) + "\n"


def _title(result: Result) -> str:
    if result["device"] != "cuda":
        return f"CPU, small network (torch {result['torch']})"
    return f"{result['card']} (torch {result['torch']}, {result['date']})"


def _head(results: Sequence[Result]) -> str:
    on_gpu = [result for result in results if result["device"] == "cuda"]
    if not results:
        status = f"**{NOT_YET.capitalize()}:** no GPU was at hand. What stands here are forecasts."
    elif not on_gpu:
        status = "**Not a GPU:** this page is of a trial of the script on a CPU; no figure in it says anything of one."
    else:
        status = "Run on: " + "; ".join(map(_title, on_gpu)) + "."
        unfinished = [_title(result) for result in on_gpu if len(result["checks"]) < len(CHECKS)]
        if unfinished:
            status += " Not all checks were run on: " + "; ".join(unfinished) + "."
    return f"""# On a GPU

<!-- Written by benchmarks/gpu/page.py. -->

    bash benchmarks/gpu.sh                  # one H100 or H200, no network, under nine minutes
    bash benchmarks/gpu.sh --device cpu     # tries the script with a small network
    bash benchmarks/gpu.sh --json PATH --page PATH --logs FOLDER    # on a machine that is lent or rented

{status}

Each of the twelve checks runs in a process of its own, with its own time limit, and prints one line. The result is
written to `benchmarks/results` as JSON named by card and day, and this page is made from it with
`python benchmarks/gpu/page.py`. **What is written there is lost with a machine that does not give its files back:**
there, give `--json` a path that comes back, and `--page` and `--logs`, too; put the JSON file into `benchmarks/results`
here before the page is made. A machine without a network gets the packages that it lacks by
`bash benchmarks/gpu_wheels.sh`, which is to be run where there is one."""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _found(result: Result, number: int) -> Mapping[str, Any] | None:
    """The outcome of a check."""
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
    return f"""## The recipe: milliseconds a pack

`configs/t2v_2b.yaml` at ZeRO-3 on one GPU: forward and backward of one pack of 16,384 tokens, and the share of
{PEAK_TFLOPS:g} TFLOP/s by exact FLOPs (below). Each row has the changes above it; what is measured has change 3 in
every row. Where no block is to be checkpointed, as few are as the dry run's estimate allows on the card, and the row
says how many. The forecast, for none, is a roofline. It assumes
{ASSUMED}.

{chr(10).join(rows)}

The optimizer's step comes once a step and is not in these figures; nor is communication, of which one GPU has none. The
EMA is left out, and of the estimate, which is the dry run's, too."""


def _segments_cell(result: Result) -> str:
    """What change 3 saves in attention, by check 7."""
    figures = (_found(result, 7) or {"figures": {}})["figures"]
    static, tight = figures.get("FA2 static"), figures.get("FA2 tight")
    if not static or not tight:
        return NOT_YET
    saved = [static[name] - tight[name] for name in ("forward_ms", "backward_ms")]
    return f"in all rows; alone {saved[0]:.2f} + {saved[1]:.2f} ms a block less (check 7)"


def _kernel_cell(result: Result) -> str:
    """What FlashAttention-3 saves, by check 7."""
    figures = (_found(result, 7) or {"figures": {}})["figures"]
    ours, theirs = figures.get("FA2 tight"), figures.get("FA3 tight")
    if not figures:
        return NOT_YET
    if not ours or not theirs or "refused" in theirs:
        return f"not measured: FA3 {figures.get('kernels', {}).get('FA3', 'refused')}"
    saved = [ours[name] - theirs[name] for name in ("forward_ms", "backward_ms")]
    return f"{saved[0]:.2f} + {saved[1]:.2f} ms a block less (check 7)"


CELLS = {3: _segments_cell, 4: _kernel_cell}
"""Changes that check 7 measures, by their numbers."""


def _block_ms(result: Result, part: str) -> str:
    """Measured milliseconds of a part of a block, by check 6."""
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

MFU is the FLOPs of the model over the time and the card's dense bfloat16 peak, {PEAK_TFLOPS:g} TFLOP/s for an H100 or
H200 (`training/hardware.py`), clocks as they are found.

* **Exact** (`packing/flops.py`), the figure above: what is really multiplied for the visible frames and their text.
  Linear layers for each token, modulation for each frame, `4 d n^2` for the attention of a layer in a segment of n
  tokens; three times that for forward and backward. Padding and recomputation do not count.
* **As others count** (`mfu_peers` in the JSON): `6 N` a token, N the weights of the blocks that act on every token, and
  `12 d n^2` a layer for attention, forward and backward. Modulation is left out of N: it is half of all weights, acts
  once a frame and not once a token, and `6 N` with all weights would say 1.8 times as much as is multiplied.

| published | share of {PEAK_TFLOPS:g} TFLOP/s | |
|---|---|---|
{rows}

None of these packs visible frames alone, and each counts FLOPs in its own way."""


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
