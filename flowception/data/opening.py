"""Opening a set, whatever its format and wherever it is."""

from __future__ import annotations

from pathlib import Path

from flowception.data.loader import DataConfig
from flowception.data.mds import MDS_FORMAT, MdsReader
from flowception.data.mixture import MixtureReader
from flowception.data.reader import ShardReader
from flowception.data.remote import CacheConfig, is_url
from flowception.data.remote_reader import RemoteReader
from flowception.data.schema import ShardMeta

DataReader = ShardReader | MdsReader | MixtureReader
"""A reader of what a run trains on."""


def open_set(path: str | Path, cache: CacheConfig | None = None) -> ShardReader | MdsReader:
    """The reader of a set.

    Args:
        path: Folder of a set of tars or of an MDS set, or the URL of a set of tars.
        cache: Where remote shards are kept; needed for a URL.

    Returns:
        The reader.

    Raises:
        FlowceptionError: If there is no such set, it is incomplete or damaged, or its format's package is missing.
    """
    if is_url(str(path)):
        return RemoteReader(str(path), cache or CacheConfig())
    if ShardMeta.load(Path(path)).format == MDS_FORMAT:
        return MdsReader(path)
    return ShardReader(path)


def open_data(config: DataConfig) -> DataReader:
    """The reader of what a run trains on: one set, or several as one.

    Raises:
        FlowceptionError: See ``open_set`` and ``MixtureReader``.
    """
    if not config.mixture:
        return open_set(config.sets[0].path, config.cache)
    readers = [open_set(share.path, config.cache) for share in config.sets]
    return MixtureReader(readers, [share.path for share in config.sets], [share.weight for share in config.sets])
