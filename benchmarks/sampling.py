"""Cost of sampling, and savings and error of caching the keys and values of finished frames.

    python benchmarks/sampling.py --gaussian RUN --demo RUN --full-sequence RUN --json FILE --picture FILE [--quick]

Up to three runs:

* ``--gaussian``: trained on correlated Gaussian frames, as described in ``benchmarks/gaussian_clips.py``. The error is
  the Fréchet distance between the joint law of each length and the closed form.
* ``--demo``: the run of ``make demo``, ``demo/run``.
* ``--full-sequence``: the same with ``delay_law=full_sequence``:
  ``python train/main.py --config configs/demo.yaml run_dir=demo/full_run delay_law=full_sequence zero.stage=0``.
  It receives lengths drawn from the law, which Flowception must learn.

Demo clips are scored by the toy world's laws and by the Fréchet distance between their moves and the world's. A move is
the displacement of the disc (its true state) from one frame to the next, and ``WINDOW_MOVES`` consecutive moves form a
sample. All samplers of a run use the same seeds, so cached and plain sampling of a clip insert the same frames at the
same steps, and ``rms_from_plain`` is the change due to the cache. ``flops_over_full_sequence`` is the ratio of FLOPs to
those of sampling clips of the same lengths with all frames present from the start, with the same network and number of
steps.

Shape legend: ``K`` clips, ``n`` frames.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import each other as benchmarks.NAME

from benchmarks.gaussian_clips import LENGTH_LAW as GAUSSIAN_LENGTHS
from benchmarks.gaussian_clips import covariance
from flowception.errors import ConfigError
from flowception.evaluation.frechet import sample_frechet_distance, sampling_frechet_distance
from flowception.evaluation.lengths import length_histogram, total_variation
from flowception.evaluation.toy.score import score_clip, score_frame
from flowception.evaluation.toy.summary import summarize
from flowception.evaluation.toy.world import LENGTH_LAW, draw_clip
from flowception.flow import SamplerConfig, SampleResult, sample
from flowception.generation.kv_cache import CachedPredictor
from flowception.generation.load import LoadedRun, load_run
from flowception.generation.predictor import NetworkPredictor
from flowception.nn import FlowceptionDiT, clip_flops
from flowception.progress import Progress

REFERENCE_STEPS = 400
WINDOW_MOVES = 3
WORLD_CLIPS = 4000
"""Clips of the toy world used to estimate the law of moves."""
FLOOR_DRAWS = 10
"""Sets of world clips, each as large as the scored set, used to estimate the noise floor of the distance."""
BATCH_SIZE = 64
QUICK_CLIPS = 24


@dataclass(frozen=True)
class Setting:
    """A sampler with its settings."""

    sampler: str
    """``plain``, ``cached`` or ``full_sequence``."""
    num_inference_steps: int
    cache_refresh_steps: int | None = None

    @property
    def label(self) -> str:
        """Short name for tables and plots."""
        cache = "" if self.cache_refresh_steps is None else f", r = {self.cache_refresh_steps}"
        return f"{self.sampler.replace('_', ' ')}, {self.num_inference_steps} steps{cache}"


def settings_of_a_run(refresh_steps: Sequence[int], steps: int, reference_steps: int) -> list[Setting]:
    """Plain sampling, cached with every refresh period, with r = steps (almost no refresh), and the reference."""
    cached = [Setting("cached", steps, r) for r in [*refresh_steps, steps]]
    return [Setting("plain", steps), *cached, Setting("plain", reference_steps)]


def network(run: LoadedRun) -> FlowceptionDiT:
    """The run's network, which must be a FlowceptionDiT."""
    if not isinstance(run.model, FlowceptionDiT):
        raise ConfigError(
            f"the model of {run.run_dir} must be a FlowceptionDiT, got {type(run.model).__name__}; give another run"
        )
    return run.model


def sample_clips(
    run: LoadedRun, setting: Setting, clips: int, lengths: Sequence[int], seed: int, progress: Progress
) -> Iterator[tuple[SampleResult, list[int]]]:
    """Sample batches of clips, with their class labels.

    Args:
        run: The run.
        setting: Sampler settings.
        clips: Number of clips.
        lengths: Frames of each clip, for full-sequence sampling, which groups clips by length.
        seed: Seed of the first clip.
        progress: Advanced by the clips of each batch.
    """
    classes = run.config.model.num_classes
    full = setting.sampler == "full_sequence"
    groups = (
        [(n, [i for i in range(clips) if lengths[i] == n]) for n in sorted(set(lengths))]
        if full
        else [(run.config.process.num_start_frames, list(range(clips)))]
    )
    height, width = run.sizes_pixels[0]
    stride = run.codec.spatial_stride
    for start, members in groups:
        for at in range(0, len(members), BATCH_SIZE):
            batch = members[at : at + BATCH_SIZE]
            labels = [i % classes if classes else -1 for i in batch]
            predict = NetworkPredictor(run.model, labels)
            if setting.cache_refresh_steps is not None:
                predict = CachedPredictor(network(run), labels, refresh_steps=setting.cache_refresh_steps)
            config = SamplerConfig(
                num_inference_steps=setting.num_inference_steps,
                num_start_frames=start,
                insertion=None if full else "thinning",
                insertion_schedule=run.config.process.insertion_schedule,
                insertion_exponent=run.config.process.insertion_exponent,
                time_shift=run.config.process.time_shift,
            )
            shape = (run.codec.latent_channels, height // stride, width // stride)
            yield sample(predict, frame_shape=shape, batch_size=len(batch), config=config, seed=seed + batch[0]), labels
            progress.advance(len(batch), note=setting.label)


def cost(run: LoadedRun, setting: Setting, results: Sequence[SampleResult]) -> dict[str, float]:
    """Mean evaluations and FLOPs per clip, and FLOPs relative to full-sequence sampling of the same lengths."""
    frames = np.concatenate([result.cu_frames.diff().numpy() for result in results])
    born = [result.born_at[a:b].max() for result in results for a, b in zip(result.cu_frames, result.cu_frames[1:])]
    flops = sum(result.flops or math.nan for result in results)
    height, width = results[0].frames.shape[-2:]
    full = setting.num_inference_steps * clip_flops(network(run).spec, frames, height, width).sum()
    return {
        "evaluations_per_clip": setting.num_inference_steps * (1 + float(np.mean(born))),
        "gflops_per_clip": flops / len(frames) / 1e9,
        "flops_over_full_sequence": flops / float(full),
        "frames_per_clip": float(frames.mean()),
    }


def paired_rms(results: Sequence[SampleResult], plain: Sequence[SampleResult]) -> float:
    """Root-mean-square difference of latents from plain sampling, for clips with the same insertions."""
    for one, other in zip(results, plain, strict=True):
        if not torch.equal(one.born_at, other.born_at):
            raise AssertionError("the cache changed an insertion; it must start after the last one")
    difference = torch.cat([one.frames - other.frames for one, other in zip(results, plain, strict=True)])
    return float(difference.square().mean().sqrt())


def score_gaussian(results: Sequence[SampleResult]) -> dict[str, Any]:
    """Score the length law, and the joint law of each length by Fréchet distance; channels count as samples.

    Clips with an impossible length count only for the length law. A distance is nan with fewer than two samples.
    """
    clips = [clip.flatten(1) for result in results for clip in result.clips()]
    distances, floors = {}, {}
    for n in GAUSSIAN_LENGTHS:
        samples = torch.cat([torch.empty(0, n), *(clip.T for clip in clips if len(clip) == n)])
        law, enough = torch.from_numpy(covariance(n)), len(samples) > 1
        distances[str(n)] = sample_frechet_distance(samples, torch.zeros(n), law) if enough else math.nan
        floors[str(n)] = sampling_frechet_distance(law, len(samples)) if enough else math.nan
    histogram = length_histogram(len(clip) for clip in clips)
    return {
        "frechet": sum(GAUSSIAN_LENGTHS[int(n)] * value for n, value in distances.items()),
        "frechet_of_sampling": sum(GAUSSIAN_LENGTHS[int(n)] * value for n, value in floors.items()),
        "frechet_by_length": distances,
        "length_total_variation": total_variation(histogram, GAUSSIAN_LENGTHS),
    }


def windows(tracks: Sequence[NDArray[np.float64]]) -> Tensor:
    """Windows of ``WINDOW_MOVES`` moves, [windows, 2 WINDOW_MOVES], from tracks [n, 2], without missing positions."""
    parts = [
        np.lib.stride_tricks.sliding_window_view(np.diff(track, axis=0), WINDOW_MOVES, axis=0).reshape(
            -1, 2 * WINDOW_MOVES
        )
        for track in tracks
        if len(track) > WINDOW_MOVES
    ]
    rows = np.concatenate(parts)
    return torch.from_numpy(rows[np.isfinite(rows).all(axis=1)])


@dataclass(frozen=True)
class WorldMoves:
    """Law of moves in the toy world, estimated from clips with an otherwise unused seed."""

    mean: Tensor
    covariance: Tensor
    tracks: list[NDArray[np.float64]]

    @classmethod
    def draw(cls) -> WorldMoves:
        """Estimate the law."""
        tracks = [draw_clip(seed=987_654, number=number).positions for number in range(WORLD_CLIPS)]
        truth = windows(tracks)
        return cls(truth.mean(dim=0), torch.cov(truth.T), tracks)

    def distance(self, tracks: Sequence[NDArray[np.float64]]) -> float:
        """Fréchet distance of the moves of other tracks, px^2; nan with fewer than two windows."""
        moves = windows(tracks)
        return sample_frechet_distance(moves, self.mean, self.covariance) if len(moves) > 1 else math.nan

    def distance_of_sampling(self, clips: int) -> float:
        """Mean distance of this many true clips: the noise floor."""
        starts = range(0, min(FLOOR_DRAWS * clips, WORLD_CLIPS - clips), clips)
        return float(np.mean([self.distance(self.tracks[at : at + clips]) for at in starts]))


def score_demo(run: LoadedRun, batches: Sequence[tuple[SampleResult, list[int]]], world: WorldMoves) -> dict[str, Any]:
    """Score clips by the toy world's laws and by the Fréchet distance of the disc's moves."""
    scores, tracks = [], []
    for result, labels in batches:
        for video, label in zip(run.codec.decode_many(result.clips()), labels, strict=True):
            pixels = np.asarray(video)
            scores.append(score_clip(pixels, label))
            frames = [score_frame(image) for image in pixels]
            tracks.append(np.array([frame.position if frame.single_shape else (np.nan, np.nan) for frame in frames]))
    summary = summarize(scores)
    names = ("color_right", "single_shape", "position_right", "position_error_px", "length_total_variation")
    return {
        "frechet_px2": world.distance(tracks),
        "frechet_px2_of_sampling": world.distance_of_sampling(len(tracks)),
        **{name: getattr(summary, name) for name in names},
    }


def measure_run(kind: str, run: LoadedRun, settings: Sequence[Setting], clips: int, seed: int) -> list[dict[str, Any]]:
    """Measure one row per setting."""
    generator = np.random.default_rng(seed)
    lengths = generator.choice(list(LENGTH_LAW), size=clips, p=list(LENGTH_LAW.values())).tolist()
    world = WorldMoves.draw() if kind != "gaussian" else None
    plain: dict[int, list[SampleResult]] = {}
    rows = []
    with Progress(clips * len(settings), f"sampling {kind}") as progress:
        for setting in settings:
            start = time.perf_counter()
            batches = list(sample_clips(run, setting, clips, lengths, seed, progress))
            seconds, results = time.perf_counter() - start, [result for result, _ in batches]
            row: dict[str, Any] = {"run": kind, "label": setting.label, **asdict(setting), "clips": clips}
            row |= cost(run, setting, results)
            row |= score_gaussian(results) if world is None else score_demo(run, batches, world)
            if setting.sampler == "plain":
                plain[setting.num_inference_steps] = results
            if setting.sampler == "cached":
                row["rms_from_plain"] = paired_rms(results, plain[setting.num_inference_steps])
            rows.append({**row, "seconds": seconds})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the results as text, one line per setting."""
    columns = {
        "evaluations_per_clip": ("evals", "{:.1f}"),
        "gflops_per_clip": ("GFLOPs", "{:.3f}"),
        "flops_over_full_sequence": ("of full", "{:.3f}"),
        "rms_from_plain": ("rms", "{:.4f}"),
        "frechet": ("Frechet", "{:.4f}"),
        "frechet_px2": ("px^2", "{:.3f}"),
        "color_right": ("color", "{:.1%}"),
        "single_shape": ("shape", "{:.1%}"),
        "position_right": ("motion", "{:.1%}"),
        "position_error_px": ("err px", "{:.2f}"),
        "length_total_variation": ("len TV", "{:.3f}"),
    }
    lines = [f"{'run':<15}{'sampler':<30}" + "".join(f"{head:>9}" for head, _ in columns.values())]
    for row in rows:
        cells = [form.format(row[name]) if row.get(name) is not None else "-" for name, (_, form) in columns.items()]
        lines.append(f"{row['run']:<15}{row['label']:<30}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def without_nan(value: Any) -> Any:
    """Replace nan by None for JSON."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def draw_picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot error against FLOPs: the Gaussian run on the left, the demo runs on the right."""
    panels = [
        ("Gaussian law", [row for row in rows if row["run"] == "gaussian"], "frechet", "Frechet distance to the law"),
        (
            "demo",
            [row for row in rows if row["run"] != "gaussian"],
            "frechet_px2",
            "Frechet distance of moves, px$^2$",
        ),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(6 * len(panels), 4.2), layout="constrained")
    marks = {"plain": "o", "cached": "s", "full_sequence": "^"}
    for number, (title, shown, name, axis_label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for sampler, mark in marks.items():
            points = [row for row in shown if row["sampler"] == sampler]
            axes.plot(
                [row["gflops_per_clip"] for row in points], [row[name] for row in points], mark, ms=6, alpha=0.8,
                label=sampler.replace("_", " "),
            )  # fmt: skip
            for row in points:
                note = (
                    f"N={row['num_inference_steps']}"
                    if row["cache_refresh_steps"] is None
                    else (f"r={row['cache_refresh_steps']}")
                )
                axes.annotate(note, (row["gflops_per_clip"], row[name]), xytext=(4, 4), textcoords="offset points",
                              fontsize=7)  # fmt: skip
        axes.set(xscale="log", xlabel="GFLOPs per clip", ylabel=axis_label, title=title)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name in ("gaussian", "demo", "full-sequence"):
        parser.add_argument(f"--{name}", type=Path, metavar="RUN", help="run directory (default: skipped)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps until the clock ends (default: 50)")
    parser.add_argument("--refresh", type=int, nargs="+", default=[1, 2, 4, 8], metavar="R", help="default: 1 2 4 8")
    parser.add_argument("--clips", type=int, default=96, metavar="K", help="demo clips per setting (default: 96)")
    parser.add_argument("--gaussian-clips", type=int, default=500, metavar="K", help="default: 500")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument("--quick", action="store_true", help="smoke test with few clips and reference steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="file for the plot of error against FLOPs")
    options = parser.parse_args(argv)
    if options.gaussian is options.demo is options.full_sequence is None:
        parser.error("give at least one of --gaussian, --demo and --full-sequence")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    options = parse_arguments(argv)
    most, reference = (QUICK_CLIPS, 2 * options.steps) if options.quick else (sys.maxsize, REFERENCE_STEPS)
    flowception = settings_of_a_run(options.refresh, options.steps, reference)
    demo = [*flowception[:-1], Setting("plain", options.steps // 2), Setting("cached", options.steps // 2, 8)]
    full = [Setting("full_sequence", n) for n in (options.steps // 2, options.steps, 2 * options.steps)]
    plans = {"gaussian": flowception, "demo": [*demo, flowception[-1]], "full_sequence": full}
    rows: list[dict[str, Any]] = []
    for kind, settings in plans.items():
        folder: Path | None = getattr(options, kind)
        if folder is not None:
            clips = options.gaussian_clips if kind == "gaussian" else options.clips
            rows += measure_run(kind, load_run(folder), settings, min(clips, most), options.seed)
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(without_nan(rows), indent=1) + "\n")
    if options.picture:
        draw_picture(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
