"""Reading clips of a shard set by row: positioned reads, only the frames asked for, every byte verified.

Opening a set checks what costs no read of clips: the codec, the index's own hash, that every shard is there and as
long as it was, and that every row lies inside its shard. Reading a clip checks its CRCs. Each error names the shard
and the clip.

Shape legend: ``n`` frames of a clip, ``k`` frames read, ``C h w`` a latent frame, ``L D`` text tokens and width.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flowception.data.index import ClipIndex
from flowception.data.schema import ShardMeta
from flowception.data.shards import HEADER_BYTES, padded_bytes, shard_name
from flowception.errors import DataError

_BYTES_PER_VALUE = 2
_MAX_OPEN_SHARDS = 64


class ClipReader(Protocol):
    """What building a pack needs of a reader."""

    @property
    def text_width(self) -> int | None:
        """D of text embeddings; None if the set has no text."""

    @property
    def latent_channels(self) -> int:
        """C."""

    def read(self, row: int, frames: ArrayLike) -> Tensor:
        """Some latent frames of a clip, bfloat16 [k, C, h, w]."""

    @property
    def null_text(self) -> Tensor | None:
        """The text of a clip without a caption or condition, bfloat16 [L, D]; None if the set has no text."""

    def read_text(self, row: int) -> Tensor | None:
        """The text embedding of a clip, bfloat16 [L, D]; None if it has none."""


class ShardReader:
    """Reads clips of one set. Safe to fork: reads are positioned and share no file cursor."""

    def __init__(self, folder: Path | str, *, codec: str | None = None, codec_fingerprint: str | None = None) -> None:
        """Open a set.

        Args:
            folder: The set's folder.
            codec: Name of the codec the run uses; None accepts any.
            codec_fingerprint: Its fingerprint; None accepts any.

        Raises:
            DataError: If the set was made by another codec, is incomplete, or its index is damaged.
        """
        self.folder = Path(folder)
        self.meta = ShardMeta.load(self.folder)
        self._check_codec(codec, codec_fingerprint)
        self._null_text = self.meta.null_embedding()
        self.index = ClipIndex.load(self.folder)
        if self.index.fingerprint() != self.meta.index_sha256:
            raise DataError(f"the index in {self.folder} is not the one meta.json was written with; encode it again")
        self.index.check(ids=False)
        self._sizes = self._check_files()
        self._check_bounds()
        self._open: OrderedDict[int, int] = OrderedDict()

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
        """The text of a clip without a caption or condition, bfloat16 [L, D]; None if the set has no text."""
        return self._null_text

    def _check_codec(self, codec: str | None, codec_fingerprint: str | None) -> None:
        for name, wanted, found in (
            ("codec", codec, self.meta.codec),
            ("codec fingerprint", codec_fingerprint, self.meta.codec_fingerprint),
        ):
            if wanted is not None and wanted != found:
                raise DataError(
                    f"{self.folder} was encoded with {name} {found!r} ({self.meta.codec}), this run uses {wanted!r}; "
                    "encode the videos again, or choose the codec of the set"
                )

    def _check_files(self) -> dict[int, int]:
        sizes = {}
        for shard in self.meta.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"shard {path} is missing ({error.strerror}); restore it or encode it again") from error
            if size != shard.size_bytes:
                raise DataError(
                    f"shard {path} has {size} bytes and should have {shard.size_bytes}: it was cut short or changed; "
                    "restore it or encode it again"
                )
            sizes[int(shard.name[6:12])] = size
        return sizes

    def _check_bounds(self) -> None:
        clips = self.index.clips
        unknown = np.setdiff1d(np.unique(clips["shard"]), np.array(list(self._sizes), dtype=np.uint32))
        if len(unknown):
            raise DataError(f"the index in {self.folder} names shard {unknown[0]}, which meta.json does not list")
        limit = np.zeros(int(clips["shard"].max(initial=0)) + 1, dtype=np.int64)
        limit[list(self._sizes)] = list(self._sizes.values())
        start, latents = clips["start"].astype(np.int64), clips["latents_offset"].astype(np.int64)
        # In float64, which cannot wrap around: sizes come from the file.
        frame_bytes = clips["height"].astype(np.float64) * clips["width"] * self.latent_channels * _BYTES_PER_VALUE
        end = clips["latents_offset"].astype(np.float64) + clips["frames"] * frame_bytes
        outside = (start < 0) | (latents < start + 2 * HEADER_BYTES) | (end > limit[clips["shard"]])
        outside |= clips["json_bytes"].astype(np.int64) > latents - start - 2 * HEADER_BYTES
        if np.any(outside):
            row = int(np.flatnonzero(outside)[0])
            raise DataError(f"{self._name(row)} lies outside its shard according to the index; encode the set again")

    def _name(self, row: int) -> str:
        return f"clip {self.index.key(row)} in {self.folder / shard_name(int(self.index.clips['shard'][row]))}"

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.folder / shard_name(shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def _read_bytes(self, row: int, offset: int, size: int) -> bytearray:
        content = bytearray(size)
        try:
            descriptor, done = self._descriptor(int(self.index.clips["shard"][row])), 0
            while done < size:
                got = os.preadv(descriptor, [memoryview(content)[done:]], offset + done)
                if got == 0:
                    raise DataError(f"{self._name(row)}: the shard ends at byte {offset + done}, it was cut short")
                done += got
        except OSError as error:
            raise DataError(f"{self._name(row)} cannot be read ({error.strerror or error})") from error
        return content

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self.index):
            raise DataError(f"row {row} is not in the index of {self.folder}, which has {len(self.index)} clips")

    def read(self, row: int, frames: ArrayLike) -> Tensor:
        """Some latent frames of a clip.

        Args:
            row: The clip's row in the index.
            frames: [k] increasing frame numbers.

        Returns:
            bfloat16 [k, C, h, w].

        Raises:
            DataError: If the bytes cannot be read or are not those that were written.
        """
        self._check_row(row)
        clip = self.index.clips[row]
        wanted = np.asarray(frames, dtype=np.int64)
        if wanted.ndim != 1 or np.any(wanted < 0) or np.any(wanted >= clip["frames"]) or np.any(np.diff(wanted) <= 0):
            raise DataError(
                f"{self._name(row)}: frames {wanted.tolist()} are not increasing in 0..{clip['frames'] - 1}"
            )
        shape = (self.latent_channels, int(clip["height"]), int(clip["width"]))
        frame_bytes = int(np.prod(shape)) * _BYTES_PER_VALUE
        out = bytearray(len(wanted) * frame_bytes)
        for first, last in _runs(wanted):
            offset = int(clip["latents_offset"]) + int(wanted[first]) * frame_bytes
            out[first * frame_bytes : last * frame_bytes] = self._read_bytes(row, offset, (last - first) * frame_bytes)
        for slot, frame in enumerate(wanted.tolist()):
            crc = zlib.crc32(memoryview(out)[slot * frame_bytes : (slot + 1) * frame_bytes])
            if crc != self.index.frame_crc[int(clip["crc_start"]) + frame]:
                raise DataError(f"{self._name(row)}: latent frame {frame} does not match its checksum")
        if not out:
            return torch.zeros(0, *shape, dtype=torch.bfloat16)
        return torch.frombuffer(out, dtype=torch.bfloat16).view(-1, *shape)

    def _read_prefix(self, row: int) -> bytearray:
        self._check_row(row)
        clip = self.index.clips[row]
        prefix = self._read_bytes(row, int(clip["start"]), int(clip["latents_offset"]) - int(clip["start"]))
        if zlib.crc32(prefix) != clip["prefix_crc"]:
            raise DataError(f"{self._name(row)}: headers, metadata or text do not match their checksum")
        return prefix

    def read_text(self, row: int) -> Tensor | None:
        """The text embedding of a clip, bfloat16 [L, D]; None if it has none. Also verifies the clip's headers."""
        prefix = self._read_prefix(row)
        tokens, width = int(self.index.clips["text_tokens"][row]), self.meta.text_width
        if tokens == 0 or width is None:
            return None
        size = tokens * width * _BYTES_PER_VALUE
        start = len(prefix) - HEADER_BYTES - padded_bytes(size)
        if start < 2 * HEADER_BYTES:
            raise DataError(f"{self._name(row)}: the index says {tokens} text tokens, more than the clip holds")
        return torch.frombuffer(prefix[start : start + size], dtype=torch.bfloat16).view(tokens, width)

    def read_metadata(self, row: int) -> dict[str, Any]:
        """The clip's JSON: caption, source, sizes."""
        prefix = self._read_prefix(row)
        size = int(self.index.clips["json_bytes"][row])
        try:
            found = json.loads(bytes(prefix[HEADER_BYTES : HEADER_BYTES + size]))
        except ValueError as error:
            raise DataError(f"{self._name(row)}: metadata is not JSON ({error})") from error
        if not isinstance(found, dict):
            raise DataError(f"{self._name(row)}: metadata is a {type(found).__name__}, not an object")
        return found

    def close(self) -> None:
        """Close every open shard. Reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _runs(frames: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Half-open ranges of positions whose frame numbers follow one another."""
    breaks = np.flatnonzero(np.diff(frames) != 1) + 1
    edges = [0, *breaks.tolist(), len(frames)]
    return [(a, b) for a, b in zip(edges[:-1], edges[1:]) if b > a]
