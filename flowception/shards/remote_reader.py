"""Reading a remote set: a ``ShardReader`` over the cache of ``remote_cache``."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flowception.errors import DataError, FlowceptionError
from flowception.shards.index import INDEX_NAMES, ClipIndex, ClipRow
from flowception.shards.reader import ChecksumError, ShardReader
from flowception.shards.remote_cache import CacheConfig, ShardCache
from flowception.shards.schema import META_NAME, ShardMeta
from flowception.shards.writer import shard_name

_MAX_OPEN = 4


def _has_index(folder: Path, meta: ShardMeta) -> bool:
    """Whether the index in a folder has the hash in the description."""
    try:
        return ClipIndex.load(folder).fingerprint() == meta.index_sha256
    except DataError:
        return False


class RemoteReader(ShardReader):
    """A ``ShardReader`` of a remote set."""

    max_open_shards = _MAX_OPEN

    def __init__(
        self, url: str, config: CacheConfig, *, codec: str | None = None, codec_fingerprint: str | None = None
    ) -> None:
        """Fetch the description and the index, and open the set.

        Args:
            url: The set's remote folder.
            config: The cache of remote shards.
            codec: See ``ShardReader``.
            codec_fingerprint: See ``ShardReader``.
        """
        described = ShardCache(url, config).read_newest(META_NAME)
        meta = ShardMeta.from_json(described.decode(errors="replace"), f"{url}/{META_NAME}")
        self.cache = ShardCache(url, config, version=meta.index_sha256)
        self.cache.place(META_NAME, described)
        self._fetch_index()
        self._wanted: SimpleQueue[int] | None = None
        try:
            super().__init__(self.cache.folder, codec=codec, codec_fingerprint=codec_fingerprint)
        except DataError:
            if _has_index(self.cache.folder, meta):
                raise
            for name in INDEX_NAMES:  # the cached copy may be damaged
                self.cache.drop(name)
            self._fetch_index()
            super().__init__(self.cache.folder, codec=codec, codec_fingerprint=codec_fingerprint)

    def _fetch_index(self) -> None:
        for name in INDEX_NAMES:
            self.cache.fetch(name)

    def check_files(self, meta: ShardMeta) -> None:
        """Do nothing: shards are fetched, and their sizes checked, when they are needed."""

    def open_shard(self, shard: int) -> int:
        """Open a shard in the cache and return its descriptor."""
        return self.cache.open_file(shard_name(shard), self._sizes[shard])

    def _read(self, row: int, clip: ClipRow, frames: ArrayLike, with_prefix: bool) -> tuple[memoryview, Tensor]:
        """Read as ``ShardReader`` does; fetch a shard with a wrong checksum again, as the copy may be damaged."""
        try:
            return super()._read(row, clip, frames, with_prefix)
        except ChecksumError:
            self.cache.drop(shard_name(clip.shard))
            if clip.shard in self._open:
                os.close(self._open.pop(clip.shard))
            return super()._read(row, clip, frames, with_prefix)

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        """Fetch the shards of some clips in the background."""
        if self._wanted is None:
            self._wanted = SimpleQueue()
            threading.Thread(target=self._prefetch_all, args=(self._wanted,), name="prefetch", daemon=True).start()
        for shard in np.unique(self.index.clips["shard"][rows]).tolist():
            self._wanted.put(shard)

    def _prefetch_all(self, wanted: SimpleQueue[int]) -> None:
        while True:
            shard = wanted.get()
            try:
                self.cache.fetch(shard_name(shard), self._sizes[shard])
            except (FlowceptionError, OSError):
                continue  # the read that needs the shard raises the error again and names the clip

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_wanted": None}
