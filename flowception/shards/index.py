"""The index of a shard set: one fixed-width row per clip, memory-mapped.

Packing needs only the index, so an epoch is planned without reading any clip. A row also has the location and the
checksums of the clip's bytes: one checksum per latent frame, so that reads of only the visible frames are verified too,
and one for everything before the latents (tar headers, JSON, text).

Shape legend: ``M`` clips of the set, ``n`` frames of a clip.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowception.errors import DataError
from flowception.shards.schema import MAX_KEY_LENGTH, NO_CLASS, check_key, clip_id

CLIP_DTYPE = np.dtype(
    [
        ("clip_id", "<u8"),
        ("start", "<u8"),  # byte of the clip's first tar header in its shard
        ("latents_offset", "<u8"),  # byte of the latents' payload; [start, latents_offset) is the prefix
        ("checksum_start", "<u8"),  # row of frame 0 in the array of frame checksums
        ("shard", "<u4"),
        ("frames", "<u4"),
        ("text_tokens", "<u4"),
        ("class_label", "<i4"),
        ("json_bytes", "<u4"),
        ("prefix_checksum", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
    ]
)


class ClipRow(NamedTuple):
    """One row of the index as plain integers, with the fields of ``CLIP_DTYPE`` in order."""

    clip_id: int
    start: int
    latents_offset: int
    checksum_start: int
    shard: int
    frames: int
    text_tokens: int
    class_label: int
    json_bytes: int
    prefix_checksum: int
    height: int
    width: int


_IN_KEYS = np.array([bool(re.fullmatch(r"[A-Za-z0-9_-]", chr(code))) for code in range(256)])
"""For each byte, whether a key may contain it."""
_CLIPS_NAME, _CHECKSUM_NAME, _KEYS_NAME = "index-clips.npy", "index-frame-checksum.npy", "index-keys.npy"
INDEX_NAMES = (_CLIPS_NAME, _CHECKSUM_NAME, _KEYS_NAME)


@dataclass
class ClipIndex:
    """Rows of a shard set. Arrays may be memory-mapped and are never written."""

    clips: NDArray[np.void]
    """[M] of ``CLIP_DTYPE``."""
    frame_checksum: NDArray[np.uint32]
    """Checksum of each latent frame, clip after clip."""
    keys: NDArray[np.bytes_]
    """[M] keys."""
    weights: NDArray[np.float64] | None = None
    """[M] mean number of times that an epoch shows each clip; None for once. Set by a mixture, not stored in a set."""

    def __len__(self) -> int:
        return len(self.clips)

    @cached_property
    def tokens_per_frame(self) -> NDArray[np.int32]:
        """[M]: latent tokens of a frame plus its insertion token."""
        return self.clips["height"].astype(np.int32) * self.clips["width"] + 1

    def row(self, row: int) -> ClipRow:
        """One clip's row of the index."""
        return ClipRow._make(self.clips[row].item())

    def key(self, row: int) -> str:
        """The key of a clip."""
        return bytes(self.keys[row]).decode("ascii")

    def rows_of(self, keys: Iterable[str]) -> NDArray[np.int64]:
        """Rows of the clips with the given keys; keys that are not in the index are skipped."""
        wanted = np.array(sorted({clip_id(key) for key in keys}), dtype=np.uint64)
        return np.flatnonzero(np.isin(self.clips["clip_id"], wanted))

    def fingerprint(self) -> str:
        """SHA-256 over all rows, checksums and keys."""
        digest = hashlib.sha256()
        for array in (self.clips, self.frame_checksum, self.keys):
            digest.update(f"{array.dtype.str}{len(array)};".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    def split(self, heldout_fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Split the set by key hash, so that a clip is on the same side in every set.

        Args:
            heldout_fraction: Expected fraction of clips held out, 0 to 1.

        Returns:
            Rows of the training part and of the held-out part.
        """
        if not 0.0 <= heldout_fraction <= 1.0:
            raise DataError(f"heldout_fraction must be a number in [0, 1], got {heldout_fraction}")
        held = self.clips["clip_id"].astype(np.float64) / 2.0**64 < heldout_fraction
        return np.flatnonzero(~held), np.flatnonzero(held)

    def check(self, *, ids: bool = True) -> None:
        """Check that rows are consistent and that keys are valid.

        Args:
            ids: Also hash every key and compare with its row (2 s for 2 million). ``finish`` and ``check_shards`` do.
                Opening a set does not need it: the index then has the hash that ``finish`` wrote.

        Raises:
            DataError: If a check fails.
        """
        if len(self.keys) != len(self.clips):
            raise DataError(f"the index has {len(self.clips)} clips but {len(self.keys)} keys; encode the set again")
        frames = self.clips["frames"].astype(np.float64)
        ends = self.clips["checksum_start"].astype(np.float64) + frames
        if np.any(frames < 1) or np.any(ends > len(self.frame_checksum)):
            raise DataError("the index has a clip without frames or without checksums; encode the set again")
        self._check_keys()
        if ids:
            self._check_ids()
        order = np.argsort(self.clips["clip_id"], kind="stable")
        sorted_ids = self.clips["clip_id"][order]
        twice = np.flatnonzero(sorted_ids[1:] == sorted_ids[:-1])
        if len(twice):
            first, second = self.key(int(order[twice[0]])), self.key(int(order[twice[0] + 1]))
            raise DataError(f"clips {first} and {second} have the same id; keys must be unique within a shard set")

    def _check_keys(self) -> None:
        """Find invalid keys in one vectorized pass; ``check_key`` raises for the first."""
        characters = np.ascontiguousarray(self.keys).view(np.uint8).reshape(len(self.keys), self.keys.itemsize)
        last = characters.shape[1] - np.argmax(characters[:, ::-1] != 0, axis=1)
        inside = np.arange(characters.shape[1]) < last[:, None]
        wrong = (~np.where(inside, _IN_KEYS[characters], True).all(axis=1)) | (characters[:, 0] == 0)
        if self.keys.itemsize > MAX_KEY_LENGTH:
            wrong |= last > MAX_KEY_LENGTH
        for row in np.flatnonzero(wrong)[:1].tolist():
            check_key(bytes(self.keys[row]).decode("ascii", "backslashreplace"))

    def _check_ids(self) -> None:
        ids = np.fromiter(map(clip_id, map(bytes.decode, self.keys.tolist())), dtype=np.uint64, count=len(self.keys))
        wrong = np.flatnonzero(ids != self.clips["clip_id"])
        if len(wrong):
            raise DataError(
                f"row {wrong[0]} of the index does not have the id of its key {self.key(int(wrong[0]))}; "
                "encode the set again"
            )

    def save(self, folder: Path) -> None:
        """Write the index into the folder of a set."""
        for name, array in ((_CLIPS_NAME, self.clips), (_CHECKSUM_NAME, self.frame_checksum), (_KEYS_NAME, self.keys)):
            partial = folder / f".{name}.partial.npy"
            np.save(partial, array, allow_pickle=False)
            partial.replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> ClipIndex:
        """Memory-map the index of a set."""
        arrays = []
        for name in (_CLIPS_NAME, _CHECKSUM_NAME, _KEYS_NAME):
            try:
                mapped = np.load(folder / name, mmap_mode="r", allow_pickle=False)
                arrays.append(mapped.view(np.ndarray))  # indexing a plain array is several times faster
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {folder / name} ({error}); encode the set again") from error
        clips, frame_checksum, keys = arrays
        if clips.dtype != CLIP_DTYPE or frame_checksum.dtype != np.uint32 or keys.dtype.kind != "S":
            raise DataError(
                f"the index in {folder} has unexpected dtypes {clips.dtype}, {frame_checksum.dtype}, {keys.dtype}; "
                "encode the set again"
            )
        return cls(clips, frame_checksum, keys)

    @classmethod
    def concatenate(cls, parts: Sequence[ClipIndex]) -> ClipIndex:
        """The index of several shards, in order."""
        clips = np.concatenate([part.clips for part in parts]) if parts else np.zeros(0, CLIP_DTYPE)
        starts = np.cumsum([0] + [len(part.frame_checksum) for part in parts])
        shift = np.repeat(starts[:-1], [len(part) for part in parts])
        clips["checksum_start"] += shift.astype(np.uint64)
        checksums = np.concatenate([part.frame_checksum for part in parts]) if parts else np.zeros(0, np.uint32)
        keys = np.concatenate([part.keys for part in parts]) if parts else np.zeros(0, "S1")
        return cls(clips, checksums, keys)

    @classmethod
    def from_arrays(
        cls,
        *,
        frames: ArrayLike,
        height: ArrayLike,
        width: ArrayLike,
        text_tokens: ArrayLike = 0,
        class_label: ArrayLike = NO_CLASS,
        clips_per_shard: int = 1000,
    ) -> ClipIndex:
        """Make an index of clips without data, for simulations and tests: clip ``i`` has key ``clip-i``.

        Args:
            frames: [M] latent frames of each clip.
            height: Latent rows; broadcast.
            width: Latent columns; broadcast.
            text_tokens: Text tokens of each clip; broadcast.
            class_label: Class of each clip, -1 for none; broadcast.
            clips_per_shard: Clips per shard.

        Returns:
            The index.
        """
        count = len(np.asarray(frames))
        keys = [f"clip-{number:09d}" for number in range(count)]
        clips = np.zeros(count, CLIP_DTYPE)
        clips["clip_id"] = [clip_id(key) for key in keys]
        clips["shard"] = np.arange(count) // clips_per_shard
        for name, value in (("frames", frames), ("height", height), ("width", width)):
            clips[name] = value
        clips["text_tokens"], clips["class_label"] = text_tokens, class_label
        starts = np.cumsum(clips["frames"].astype(np.int64))
        clips["checksum_start"] = starts - clips["frames"]
        total = int(starts[-1]) if count else 0
        return cls(clips, np.zeros(total, np.uint32), np.array(keys, dtype="S14"))
