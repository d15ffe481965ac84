"""Clips per CPU-second of three readers on the same clips: one process, interleaved, files in the page cache.

* ``ours``: the indexed reader in random order, every byte verified by checksum.
* ``webdataset``: webdataset over the same tars in order, without verification.
* ``mds``: mosaicml-streaming's ``StreamingDataset`` over the same clips as MDS, with its default shuffling.

All three return latents and text as tensors. ``ours, visible frames`` reads only the frames that training reads, about
three quarters of them at the default prior. Needs mosaicml-streaming (``make setup-mds``):

    .venv-mds/bin/python benchmarks/loading.py --json loading.json --picture loading.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import webdataset
from torch import Tensor

from flowception.shards.mds import import_streaming, write_mds
from flowception.shards.reader import ShardReader
from flowception.shards.schema import ClipRecord, NullText, ShardMeta
from flowception.shards.writer import ShardSetWriter

FRAMES, CHANNELS, GRID = 38, 128, 8
TEXT_WIDTH, MAX_TEXT = 512, 77
VISIBLE_SHARE = 0.77
"""Mean fraction of visible frames of a clip at the default prior."""
GOALS = {"webdataset": 2.5, "mds": 4.0}


def make_set(folder: Path, clips: int, per_shard: int) -> ShardReader:
    """Make a set of clips with 623 KB of latents and 8 to 79 KB of text."""
    random = np.random.default_rng(0)
    null_text = NullText.of(torch.zeros(1, TEXT_WIDTH))
    meta = ShardMeta(
        codec="none", codec_fingerprint="0", latent_channels=CHANNELS, text_width=TEXT_WIDTH, null_text=null_text
    )
    writer = ShardSetWriter(folder, meta)

    def records(shard: int) -> Iterator[ClipRecord]:
        for number in range(shard * per_shard, min((shard + 1) * per_shard, clips)):
            generator = torch.Generator().manual_seed(number)
            text_tokens = int(random.integers(8, MAX_TEXT + 1))
            yield ClipRecord(
                key=f"clip-{number:06d}",
                latents=torch.randn(FRAMES, CHANNELS, GRID, GRID, generator=generator),
                text=torch.randn(text_tokens, TEXT_WIDTH, generator=generator),
                caption="a caption of usual length, about what a person sees in the clip",
            )

    for shard in range(-(-clips // per_shard)):
        writer.write_shard(shard, records(shard))
    writer.finish()
    return ShardReader(folder)


def _bf16(content: bytes, shape: list[int]) -> Tensor:
    return torch.frombuffer(content, dtype=torch.bfloat16).view(shape)  # not copied, therefore read-only


def read_ours(folder: Path) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Read every clip once in random order."""
    reader, random, every = ShardReader(folder), np.random.default_rng(1), np.arange(FRAMES)
    for row in random.permutation(len(reader.index)).tolist():
        yield reader.read_clip(row, every)


def read_visible(folder: Path) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Read every clip once in random order, with a random subset of frames as in training."""
    reader, random = ShardReader(folder), np.random.default_rng(1)
    for row in random.permutation(len(reader.index)).tolist():
        yield reader.read_clip(row, np.flatnonzero(random.random(FRAMES) < VISIBLE_SHARE))


def read_webdataset(folder: Path) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Read every clip once in tar order."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        described = json.loads(sample["json"])
        yield (
            _bf16(sample["latents.bf16"], described["latents_shape"]),
            _bf16(sample["text.bf16"], described["text_shape"]),
        )


def read_mds(folder: Path) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Read every clip once in the order of ``StreamingDataset``."""
    for sample in import_streaming().StreamingDataset(local=str(folder), batch_size=1, shuffle=True):
        described = json.loads(sample["json"])
        yield _bf16(sample["latents"], described["latents_shape"]), _bf16(sample["text"], described["text_shape"])


def measure(read: Callable[[], Iterator[tuple[Tensor, Tensor | None]]]) -> dict[str, float]:
    """Measure the CPU time of opening the set and reading all clips."""
    cpu, wall, clips, size = time.process_time(), time.perf_counter(), 0, 0
    for latents, text in read():
        clips += 1
        size += latents.nbytes + (0 if text is None else text.nbytes)
    cpu = time.process_time() - cpu
    return {"clips": clips, "bytes": size, "cpu_s": cpu, "wall_s": time.perf_counter() - wall}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Plot clips per CPU-second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    names = list(figures)
    axes.barh(names, [figures[name]["clips_per_cpu_s"] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("clips of 680 KB per CPU-second")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the comparison."""
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    parser = argparse.ArgumentParser(description="Clips per CPU-second of three readers.")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--clips-per-shard", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tars, mds = Path(scratch) / "tars", Path(scratch) / "mds"
        reader = make_set(tars, arguments.clips, arguments.clips_per_shard)
        mds.mkdir()
        write_mds(reader, mds, shard_bytes=2**27)
        ways: dict[str, Callable[[], Iterator[tuple[Tensor, Tensor | None]]]] = {
            "ours": lambda: read_ours(tars),
            "ours, visible frames": lambda: read_visible(tars),
            "webdataset": lambda: read_webdataset(tars),
            "mds": lambda: read_mds(mds),
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, read in ways.items():
                runs[name].append(measure(read))
    figures = {}
    for name, found in runs.items():
        cpu_s = statistics.median(run["cpu_s"] for run in found)
        figures[name] = {
            "clips": found[0]["clips"],
            "bytes_per_clip": found[0]["bytes"] / found[0]["clips"],
            "clips_per_cpu_s": found[0]["clips"] / cpu_s,
            "megabytes_per_cpu_s": found[0]["bytes"] / cpu_s / 1e6,
            "best_clips_per_cpu_s": found[0]["clips"] / min(run["cpu_s"] for run in found),
        }
        print(name, json.dumps(figures[name]), flush=True)
    ratios = {name: figures["ours"]["clips_per_cpu_s"] / figures[name]["clips_per_cpu_s"] for name in GOALS}
    missed = [
        f"{name}: {ratio:.2f} times, goal is {GOALS[name]}" for name, ratio in ratios.items() if ratio < GOALS[name]
    ]
    if arguments.picture:
        draw(figures, arguments.picture)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"figures": figures, "ours_over": ratios, "missed": missed}, indent=2) + "\n"
        )
    print("ours over", json.dumps(ratios), "MISSED" if missed else "every goal reached", missed)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
