"""Data and scores of the claims study: state videos of the toy world.

A clip is a state video: the positions of the toy world, with one two-channel latent per frame. A network generates the
state directly, so nothing has to be measured from pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception.evaluation.frechet import sample_frechet_distance
from flowception.evaluation.lengths import length_histogram, sampling_total_variation, total_variation
from flowception.evaluation.toy.motion import HIGH_PX, LOW_PX, drift_px_per_frame, piece_errors_px
from flowception.evaluation.toy.world import LENGTH_LAW, draw_track
from flowception.shards.schema import META_NAME, ClipRecord, ShardMeta
from flowception.shards.writer import ShardSetWriter

Tracks = Sequence[NDArray[np.float64]]
"""Positions in pixels, [n, 2] per clip."""
CENTER_PX = (LOW_PX + HIGH_PX) / 2
STD_PX = (HIGH_PX - LOW_PX) / math.sqrt(12)
"""Standard deviation of a position, which is uniform between the walls."""
SCORED_FRAMES = min(LENGTH_LAW)
"""Number of consecutive frames scored at once, so that long and short clips are comparable: every such window for the
trajectory error, the last window of a clip for the Fréchet distance. All windows have the same true law."""
DATA_SEED, REFERENCE_SEED = 0, 1
REFERENCE_CLIPS = 8_000
SHARDS = 16


def make_data(folder: Path, clips: int) -> Path:
    """Write the shard set of state videos, unless it exists."""
    if (folder / META_NAME).is_file():
        return folder
    identity = {"world": "toy", "mean": CENTER_PX, "std": STD_PX}
    meta = ShardMeta(
        codec="toy_state",
        codec_fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        latent_channels=2,
        latent_mean=[CENTER_PX] * 2,
        latent_std=[STD_PX] * 2,
    )
    writer = ShardSetWriter(folder, meta)
    for shard, numbers in enumerate(np.array_split(np.arange(clips), SHARDS)):
        writer.write_shard(shard, (_record(int(number)) for number in numbers))
    writer.finish()
    return folder


def _record(number: int) -> ClipRecord:
    track = draw_track(DATA_SEED, number)
    return ClipRecord(key=f"state-{number:06d}", latents=to_latents(track.positions))


def to_latents(positions: NDArray[np.float64]) -> Tensor:
    """Convert positions [n, 2] to normalized latents, float32 [n, 2, 1, 1]."""
    return torch.from_numpy((positions - CENTER_PX) / STD_PX).float()[:, :, None, None]


def to_positions(latents: Tensor) -> NDArray[np.float64]:
    """Convert latents [n, 2, 1, 1] to positions in pixels, float64 [n, 2]."""
    return latents[:, :, 0, 0].double().cpu().numpy() * STD_PX + CENTER_PX


def real_tracks(clips: int, first: int = 0) -> list[NDArray[np.float64]]:
    """Draw clips of the world that no arm is trained on."""
    return [draw_track(REFERENCE_SEED, first + number).positions for number in range(clips)]


@lru_cache(maxsize=1)
def reference() -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``SCORED_FRAMES`` frames of the true law."""
    tracks = real_tracks(REFERENCE_CLIPS)
    ends = torch.from_numpy(np.stack([track[-SCORED_FRAMES:].ravel() for track in tracks]))
    return ends.mean(dim=0), torch.cov(ends.T)


def score(tracks: Tracks, chose_lengths: bool) -> dict[str, Any]:
    """Score clips by the laws of the toy world.

    Args:
        tracks: At least one clip.
        chose_lengths: Whether the model chose their lengths.

    Returns:
        The metrics; None where undefined. Clips shorter than ``SCORED_FRAMES`` count only for their length.
    """
    lengths = [len(track) for track in tracks]
    long = [track for track in tracks if len(track) >= SCORED_FRAMES]
    ends = np.array([track[-SCORED_FRAMES:].ravel() for track in long])
    errors = [error.mean() for error in piece_errors_px(long, SCORED_FRAMES)]
    histogram = length_histogram(lengths)
    return {
        "sampled_clips": len(tracks),
        "trajectory_error_px": float(np.mean(errors)) if errors else None,
        "drift_px_per_frame": drift_px_per_frame(piece_errors_px(long)) if long else None,
        "frechet_px2": sample_frechet_distance(torch.from_numpy(ends), *reference()) if len(long) > 1 else None,
        "clips_long_enough": len(long),
        "mean_frames": float(np.mean(lengths)),
        "length_total_variation": total_variation(histogram, LENGTH_LAW) if chose_lengths else None,
        "length_total_variation_of_sampling": sampling_total_variation(LENGTH_LAW, len(tracks)),
    }


def references(clips: int) -> dict[str, dict[str, Any]]:
    """Metrics of real clips, and of clips with independent random positions."""
    real = real_tracks(clips, first=REFERENCE_CLIPS)
    random = np.random.default_rng(0)
    return {
        "real": score([to_positions(to_latents(track).bfloat16()) for track in real], True),
        "independent_frames": score([random.uniform(LOW_PX, HIGH_PX, track.shape) for track in real], True),
    }
