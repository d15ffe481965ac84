"""Make a shard set of correlated Gaussian frames with a closed-form law.

    python benchmarks/gaussian_clips.py --out gaussian/shards
    python train/main.py --config benchmarks/gaussian.yaml run_dir=gaussian/run data.path=gaussian/shards

A frame is 3 numbers (one latent of 3 channels). Each channel is an independent AR(1) process over the frames,
``x_0 ~ N(0, 1)``, ``x_i = rho x_{i-1} + sqrt(1 - rho^2) e_i``, so the covariance of frames i and j is ``rho^|i - j|``
for every length. A network trained on the set can be compared with that law for each length.

Shape legend: ``n`` frames of a clip, ``K`` clips.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flowception.codecs import CodecConfig, build_codec
from flowception.shards.schema import ClipRecord, ShardMeta
from flowception.shards.writer import ShardSetWriter

CHANNELS = 3
RHO = 0.8
LENGTH_LAW = {4: 0.5, 8: 0.5}
CLIPS_PER_SHARD = 5000


def covariance(frames: int) -> NDArray[np.float64]:
    """Covariance of the frames of one channel, [n, n]."""
    place = np.arange(frames)
    covariances: NDArray[np.float64] = RHO ** np.abs(place[:, None] - place[None, :])
    return covariances


def draw_clips(clips: int, frames: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw clips from the law, [K, n, CHANNELS]."""
    noise = generator.standard_normal((clips, frames, CHANNELS))
    return np.einsum("ij,kjc->kic", np.linalg.cholesky(covariance(frames)), noise)


def records(first: int, count: int, seed: int) -> Iterator[ClipRecord]:
    """Yield clips ``first`` to ``first + count`` of the set."""
    generator = np.random.default_rng([seed, first])
    lengths = generator.choice(list(LENGTH_LAW), size=count, p=list(LENGTH_LAW.values()))
    for number, frames in enumerate(lengths.tolist(), start=first):
        values = draw_clips(1, frames, generator)[0]
        latents = torch.from_numpy(values).float()[:, :, None, None]
        yield ClipRecord(key=f"gaussian-{number:07d}", latents=latents, fps=8.0)


def write_set(folder: Path, clips: int, seed: int) -> None:
    """Write the shard set, with codec patchify and patches of one pixel: 3 channels, no classes, no text."""
    codec = build_codec(CodecConfig(name="patchify", patch_size=1))
    meta = ShardMeta(
        codec="patchify",
        codec_fingerprint=codec.fingerprint(),
        latent_channels=CHANNELS,
        codec_config={"patch_size": 1},
    )
    writer = ShardSetWriter(folder, meta)
    for shard, first in enumerate(range(0, clips, CLIPS_PER_SHARD)):
        writer.write_shard(shard, records(first, min(CLIPS_PER_SHARD, clips - first), seed))
    writer.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and write the set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shard set")
    parser.add_argument("--clips", type=int, default=60_000, metavar="N", help="default: 60000")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    arguments = parser.parse_args(argv)
    write_set(arguments.out, arguments.clips, arguments.seed)
    print(f"wrote {arguments.clips} clips to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
