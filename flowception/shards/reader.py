"""Reading clips of a shard set by row: positioned reads of only the requested frames, with every byte verified.

Opening a set checks everything that needs no clip reads: the codec, the hash of the index, that every shard exists with
its original size, and that every row is inside its shard. Reading a clip verifies its checksums. Each error names the
shard and the clip.

Shape legend: ``n`` frames of a clip, ``k`` frames read, ``C h w`` a latent frame, ``L D`` text tokens and width.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from operator import lt
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flowception.errors import DataError
from flowception.shards.index import ClipIndex, ClipRow
from flowception.shards.schema import FORMAT, ShardMeta, checksum, checksums
from flowception.shards.writer import HEADER_BYTES, padded_bytes, shard_name

_BYTES_PER_VALUE = 2
_SIZE_FIELD = slice(124, 136)
"""Bytes of a tar header that hold the payload size, in octal."""


class ChecksumError(DataError):
    """A clip's bytes differ from those that were written."""


class ClipReader(Protocol):
    """The part of a reader that building a pack needs."""

    @property
    def text_width(self) -> int | None:
        """D of text embeddings; None if the set has no text."""

    @property
    def latent_channels(self) -> int:
        """C."""

    @property
    def null_text(self) -> Tensor | None:
        """Text for clips without a caption or condition, bfloat16 [L, D]; None if the set has no text."""

    def read_clip(self, row: int, frames: ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Some latent frames of a clip, bfloat16 [k, C, h, w], and its text, bfloat16 [L, D]; None if it has none."""

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        """Prepare to read some clips soon."""

    def describe(self, row: int) -> str:
        """A clip and its file, for messages."""


def frames_refused(wanted: NDArray[np.int64], num_frames: int) -> str:
    """Why frame numbers are refused; empty if they increase and are all frames of the clip."""
    numbers = wanted.tolist() if wanted.ndim == 1 else [-1]
    if not numbers or (numbers[0] >= 0 and numbers[-1] < num_frames and all(map(lt, numbers, numbers[1:]))):
        return ""
    return f"frame numbers must increase within 0..{num_frames - 1}, got {wanted.tolist()}"


class FolderReader:
    """Base class of the readers of both formats: opens and verifies a folder."""

    format: ClassVar[str]
    """The format's name in ``meta.json``."""

    def __init__(self, folder: Path | str, *, codec: str | None = None, codec_fingerprint: str | None = None) -> None:
        """Open a set.

        Args:
            folder: The set's folder.
            codec: Name of the codec the run uses; None accepts any.
            codec_fingerprint: Its fingerprint; None accepts any.

        Raises:
            DataError: If the set was made by another codec, is incomplete, or has a damaged index.
        """
        self.folder = Path(folder)
        self.meta = ShardMeta.load(self.folder)
        if self.meta.format != self.format:
            raise DataError(
                f"{self.folder} must be a set in format {self.format!r}, got {self.meta.format!r}; give another set"
            )
        self._check_codec(codec, codec_fingerprint)
        self._null_text = self.meta.null_embedding()
        self.index = ClipIndex.load(self.folder)
        if self.index.fingerprint() != self.meta.index_sha256:
            raise DataError(f"the index in {self.folder} does not match meta.json; encode the set again")
        self.index.check(ids=False)
        self.check_files(self.meta)

    @property
    def text_width(self) -> int | None:
        """D of text embeddings; None if the set has no text."""
        return self.meta.text_width

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.meta.latent_channels

    @property
    def null_text(self) -> Tensor | None:
        """Text for clips without a caption or condition, bfloat16 [L, D]; None if the set has no text."""
        return self._null_text

    def _check_codec(self, codec: str | None, codec_fingerprint: str | None) -> None:
        for name, wanted, found in (
            ("codec", codec, self.meta.codec),
            ("codec fingerprint", codec_fingerprint, self.meta.codec_fingerprint),
        ):
            if wanted is not None and wanted != found:
                raise DataError(
                    f"{self.folder} was encoded with {name} {found!r} ({self.meta.codec}), but this run uses "
                    f"{wanted!r}; encode the videos again or use the set's codec"
                )

    def check_files(self, meta: ShardMeta) -> None:
        """Raise ``DataError`` if a shard is missing or its size has changed."""
        for shard in meta.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"shard {path} is missing ({error.strerror}); restore it or encode it again") from error
            if size != shard.size_bytes:
                raise DataError(
                    f"shard {path} has {size} bytes, expected {shard.size_bytes}: it was truncated or changed; "
                    "restore it or encode it again"
                )

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        """Do nothing: local shards need no fetching."""


class ShardReader(FolderReader):
    """Reads clips of a set of tars. Safe to fork: reads are positioned, so processes share no file offset."""

    format = FORMAT
    max_open_shards = 64

    def __init__(self, folder: Path | str, *, codec: str | None = None, codec_fingerprint: str | None = None) -> None:
        """Open a set; see ``FolderReader``. Also raises ``DataError`` if a row is outside its shard."""
        super().__init__(folder, codec=codec, codec_fingerprint=codec_fingerprint)
        self._sizes = {int(shard.name[6:12]): shard.size_bytes for shard in self.meta.shards}
        self._check_bounds()
        self._open: OrderedDict[int, int] = OrderedDict()

    def _check_bounds(self) -> None:
        clips = self.index.clips
        unknown = np.setdiff1d(np.unique(clips["shard"]), np.array(list(self._sizes), dtype=np.uint32))
        if len(unknown):
            raise DataError(
                f"the index in {self.folder} refers to shard {unknown[0]}, which meta.json does not list; "
                "encode the set again"
            )
        limit = np.zeros(int(clips["shard"].max(initial=0)) + 1, dtype=np.int64)
        limit[list(self._sizes)] = list(self._sizes.values())
        start, latents = clips["start"].astype(np.int64), clips["latents_offset"].astype(np.int64)
        # float64, because sizes come from the file and an integer product could wrap around.
        frame_bytes = clips["height"].astype(np.float64) * clips["width"] * self.latent_channels * _BYTES_PER_VALUE
        end = clips["latents_offset"].astype(np.float64) + clips["frames"] * frame_bytes
        outside = (start < 0) | (latents < start + 2 * HEADER_BYTES) | (end > limit[clips["shard"]])
        outside |= clips["json_bytes"].astype(np.int64) > latents - start - 2 * HEADER_BYTES
        if np.any(outside):
            row = int(np.flatnonzero(outside)[0])
            raise DataError(f"{self.describe(row)} is outside its shard according to the index; encode the set again")

    def open_shard(self, shard: int) -> int:
        """Open a shard and return its descriptor; the reader closes it."""
        return os.open(self.folder / shard_name(shard), os.O_RDONLY | os.O_CLOEXEC)

    def describe(self, row: int) -> str:
        """A clip and its file, for messages."""
        return f"clip {self.index.key(row)} in {self.folder / shard_name(int(self.index.clips['shard'][row]))}"

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self.max_open_shards:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = self.open_shard(shard)
        return self._open[shard]

    def _row(self, row: int) -> ClipRow:
        if not 0 <= row < len(self.index):
            raise DataError(f"row {row} is not in the index of {self.folder}, which has {len(self.index)} clips")
        return self.index.row(row)

    def _read_into(self, content: memoryview, row: int, shard: int, offset: int) -> None:
        try:
            descriptor, done = self._descriptor(shard), 0
            while done < len(content):
                got = os.preadv(descriptor, [content[done:]], offset + done)
                if got == 0:
                    raise DataError(f"{self.describe(row)}: the shard is truncated at byte {offset + done}")
                done += got
        except OSError as error:
            raise DataError(f"cannot read {self.describe(row)} ({error.strerror or error})") from error

    def read_clip(self, row: int, frames: ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Read some latent frames of a clip and its text, with one positioned read where they are contiguous.

        Args:
            row: The clip's row in the index.
            frames: [k] increasing frame numbers.

        Returns:
            Latents, bfloat16 [k, C, h, w], and text, bfloat16 [L, D], or None if the clip has none.

        Raises:
            DataError: If the bytes cannot be read or differ from those that were written.
        """
        clip = self._row(row)
        prefix, latents = self._read(row, clip, frames, with_prefix=True)
        return latents, self._text(row, clip, prefix)

    def read(self, row: int, frames: ArrayLike) -> Tensor:
        """Some latent frames of a clip without its text; see ``read_clip``."""
        return self._read(row, self._row(row), frames, with_prefix=False)[1]

    def read_text(self, row: int) -> Tensor | None:
        """The text embedding of a clip without its latents; see ``read_clip``."""
        clip = self._row(row)
        return self._text(row, clip, self._read(row, clip, [], with_prefix=True)[0])

    def read_metadata(self, row: int) -> dict[str, Any]:
        """The clip's JSON: caption, source, sizes."""
        clip = self._row(row)
        prefix = self._read(row, clip, [], with_prefix=True)[0]
        try:
            found = json.loads(bytes(prefix[HEADER_BYTES : HEADER_BYTES + clip.json_bytes]))
        except ValueError as error:
            raise DataError(f"{self.describe(row)}: metadata is not JSON ({error})") from error
        if not isinstance(found, dict):
            raise DataError(f"{self.describe(row)}: metadata must be a JSON object, got {type(found).__name__}")
        return found

    def _read(self, row: int, clip: ClipRow, frames: ArrayLike, with_prefix: bool) -> tuple[memoryview, Tensor]:
        """Read and verify the bytes before the latents (if requested, else empty) and some frames, in one buffer."""
        wanted = np.asarray(frames, dtype=np.int64)
        if refused := frames_refused(wanted, clip.frames):
            raise DataError(f"{self.describe(row)}: {refused}")
        numbers = wanted.tolist()
        shape = (self.latent_channels, clip.height, clip.width)
        frame_bytes = math.prod(shape) * _BYTES_PER_VALUE
        prefix_bytes = clip.latents_offset - clip.start if with_prefix else 0
        content, done = np.empty(prefix_bytes + len(numbers) * frame_bytes, dtype=np.uint8).data, 0
        for offset, size in _contiguous_ranges(clip, numbers, frame_bytes, with_prefix):
            self._read_into(content[done : done + size], row, clip.shard, offset)
            done += size
        prefix, latents = content[:prefix_bytes], content[prefix_bytes:]
        if with_prefix and checksum(prefix) != clip.prefix_checksum:
            raise ChecksumError(f"{self.describe(row)}: headers, metadata or text do not match their checksum")
        expected = self.index.frame_checksum[wanted + clip.checksum_start].tolist()
        found = checksums(latents, frame_bytes)
        if found != expected:
            frame = next(number for number, *pair in zip(numbers, found, expected) if pair[0] != pair[1])
            raise ChecksumError(f"{self.describe(row)}: latent frame {frame} does not match its checksum")
        if not numbers:
            return prefix, torch.empty(0, *shape, dtype=torch.bfloat16)
        return prefix, torch.frombuffer(content, dtype=torch.bfloat16, offset=prefix_bytes).view(len(numbers), *shape)

    def _text(self, row: int, clip: ClipRow, prefix: memoryview) -> Tensor | None:
        tokens, width = clip.text_tokens, self.meta.text_width
        if tokens == 0 or width is None:
            return None
        size = tokens * width * _BYTES_PER_VALUE
        start = len(prefix) - HEADER_BYTES - padded_bytes(size)
        header = max(0, start - HEADER_BYTES)
        if start < 3 * HEADER_BYTES or prefix[header:][_SIZE_FIELD] != b"%011o\0" % size:
            raise DataError(
                f"{self.describe(row)}: the index lists {tokens} text tokens, but the clip has another number or none"
            )
        return torch.frombuffer(prefix, dtype=torch.bfloat16, count=tokens * width, offset=start).view(tokens, width)

    def close(self) -> None:
        """Close every open shard. Reads open them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _contiguous_ranges(
    clip: ClipRow, numbers: list[int], frame_bytes: int, with_prefix: bool
) -> Iterator[tuple[int, int]]:
    """The byte ranges to read, as (offset in the shard, size); contiguous parts are merged."""
    start, end = (clip.start, clip.latents_offset) if with_prefix else (clip.latents_offset, clip.latents_offset)
    one_run = bool(numbers) and numbers[-1] - numbers[0] + 1 == len(numbers)
    for number, count in [(numbers[0], len(numbers))] if one_run else ((number, 1) for number in numbers):
        offset = clip.latents_offset + number * frame_bytes
        if offset != end:
            yield start, end - start
            start = offset
        end = offset + count * frame_bytes
    yield start, end - start
