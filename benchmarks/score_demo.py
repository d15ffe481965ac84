"""Score toy clips (generated, real, and from an untrained model) by the toy world's laws.

    python benchmarks/score_demo.py --real DIR --generated DIR --untrained DIR [--json FILE] [--picture FILE] [--check]

A folder contains mp4 files and optionally their labels: ``clips.jsonl`` of ``flowception generate`` (``file, task,
class_label``) or ``manifest.jsonl`` of ``make_toy.py`` (``path, class_label``). The class of an image-to-video clip is
that of its first frame, which is context and not scored. ``--check`` lists the demo's promises and exits with 1 if one
is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flowception.codecs.video_file import read_video
from flowception.errors import DataError, FlowceptionError
from flowception.evaluation.toy.score import class_of_first_frame, score_clip
from flowception.evaluation.toy.summary import SetSummary, promises, summarize
from flowception.evaluation.toy.world import LENGTH_LAW

ROWS = {
    "clips": "{:.0f}",
    "color_right": "{:.1%}",
    "single_shape": "{:.1%}",
    "color_constant": "{:.1%}",
    "position_right": "{:.1%}",
    "area_variation": "{:.3f}",
    "position_error_px": "{:.2f}",
    "speed_px": "{:.2f}",
    "mean_frames": "{:.2f}",
    "length_total_variation": "{:.3f}",
    "length_total_variation_of_sampling": "{:.3f}",
}
PICTURED_CLIPS = 4
BAR_SCALE = 60
"""Length of a bar of 100 %, in characters."""


@dataclass(frozen=True)
class LabeledClip:
    """A clip with its expected class."""

    video: NDArray[np.uint8]
    class_label: int | None
    given_frames: int


def read_folder(folder: Path, limit: int | None = None) -> list[LabeledClip]:
    """Read a folder's clips with their labels.

    Args:
        folder: Folder of mp4 files.
        limit: Maximum number of clips to read; None reads all.
    """
    clips = []
    for row in _rows(folder)[:limit]:
        video = read_video(folder / str(row.get("file") or row.get("path")))
        label, given = row.get("class_label"), 0
        if row.get("task") == "i2v":
            label, given = class_of_first_frame(video), 1
        clips.append(LabeledClip(video, None if label in (None, -1) else int(label), given))
    return clips


def _rows(folder: Path) -> list[dict[str, Any]]:
    for name in ("clips.jsonl", "manifest.jsonl"):
        if (folder / name).is_file():
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines() if line.strip()]
            break
    else:
        rows = [{"path": path.name} for path in sorted(folder.glob("*.mp4"))]
    if not rows:
        raise DataError(f"{folder} has no clips; give an output folder of make_toy.py or flowception generate")
    return rows


def table(summaries: Mapping[str, SetSummary]) -> str:
    """Format the summaries as a table, one column per set."""
    lines = [f"{'':<36}" + "".join(f"{name:>12}" for name in summaries)]
    for name, form in ROWS.items():
        values = [float(getattr(summary, name)) for summary in summaries.values()]
        cells = ["-" if math.isnan(value) else form.format(value) for value in values]
        lines.append(f"{name.replace('_', ' '):<36}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def histogram(generated: SetSummary) -> str:
    """Plot the lengths of generated clips against the law, as text."""
    lines = [f"{'frames':<8}{'law':>7}{'generated':>11}   (# generated, | the law)"]
    for frames in sorted(set(LENGTH_LAW) | set(generated.length_histogram)):
        law, share = LENGTH_LAW.get(frames, 0.0), generated.length_histogram.get(frames, 0.0)
        bar = list(("#" * round(share * BAR_SCALE)).ljust(BAR_SCALE + 1))
        bar[round(law * BAR_SCALE)] = "|"
        lines.append(f"{frames:<8}{law:>7.0%}{share:>11.1%}   {''.join(bar).rstrip()}")
    return "\n".join(lines)


def draw(path: Path, sets: Mapping[str, Sequence[LabeledClip]], summaries: Mapping[str, SetSummary]) -> None:
    """Plot some clips of each set as film strips, and the length laws."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    columns = figure.add_gridspec(len(sets), 2, width_ratios=(2, 1))
    longest = max(LENGTH_LAW)
    for number, (name, clips) in enumerate(sets.items()):
        strips = []
        for clip in clips[:PICTURED_CLIPS]:
            frames = np.pad(clip.video[:longest], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
            strip = np.concatenate(list(frames), axis=1)
            width = longest * frames.shape[2]
            strips.append(np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255))
        axes = figure.add_subplot(columns[number, 0])
        axes.imshow(np.concatenate(strips, axis=0), interpolation="nearest")
        color, shape = summaries[name].color_right, summaries[name].single_shape
        axes.set_title(f"{name}: color right in {color:.0%} of clips, one shape in {shape:.0%} of frames", fontsize=9)
        axes.set_axis_off()
    axes = figure.add_subplot(columns[:, 1])
    shown = {"the law": LENGTH_LAW, **{name: s.length_histogram for name, s in summaries.items()}}
    lengths = sorted({n for law in shown.values() for n in law})
    for number, (name, law) in enumerate(shown.items()):
        places = np.arange(len(lengths)) + (number - (len(shown) - 1) / 2) * 0.8 / len(shown)
        axes.bar(places, [law.get(n, 0.0) for n in lengths], width=0.8 / len(shown), label=name)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set(xlabel="frames", ylabel="share of clips", title="length of a clip")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _jsonable(value: Any) -> Any:
    """Replace non-finite numbers by None for JSON."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, score the clips and report.

    Args:
        argv: Arguments after the script name; None uses ``sys.argv``.

    Returns:
        0; with ``--check`` 1 if a promise is broken; 2 for bad input.
    """
    parser = argparse.ArgumentParser(description="Score toy clips by the toy world's laws.")
    for name in ("real", "generated", "untrained"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--max-real", type=int, default=400, metavar="N", help="real clips to score (default: 400)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the scores")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="file for a plot of clips and lengths")
    parser.add_argument("--check", action="store_true", help="list the demo's promises; exit code 1 if one is broken")
    arguments = parser.parse_args(argv)
    try:
        sets = {
            name: [
                clip
                for folder in getattr(arguments, name)
                for clip in read_folder(folder, arguments.max_real if name == "real" else None)
            ]
            for name in ("real", "generated", "untrained")
        }
    except FlowceptionError as error:
        print(f"score_demo: error: {error}", file=sys.stderr)
        return 2
    summaries = {
        name: summarize([score_clip(clip.video, clip.class_label, clip.given_frames) for clip in clips])
        for name, clips in sets.items()
    }
    kept = promises(summaries["generated"], summaries["untrained"])
    print(table(summaries), histogram(summaries["generated"]), sep="\n\n", end="\n\n")
    if arguments.check:
        print(*(f"{'kept  ' if holds else 'BROKEN'}  {words}" for words, holds in kept), sep="\n")
    if arguments.json is not None:
        report: dict[str, Any] = {name: asdict(summary) for name, summary in summaries.items()}
        report["promises"] = {words: holds for words, holds in kept}
        report["length_law"] = dict(LENGTH_LAW)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(_jsonable(report), indent=2) + "\n")
    if arguments.picture is not None:
        draw(arguments.picture, sets, summaries)
    return 1 if arguments.check and not all(holds for _, holds in kept) else 0


if __name__ == "__main__":
    sys.exit(main())
