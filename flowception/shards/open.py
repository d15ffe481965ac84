"""Opening a set, whatever its format and wherever it is: what a configuration says of data, and the reader of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flowception.errors import ConfigError
from flowception.ranges import check_ranges, integer, number, shown
from flowception.shards.mds import MDS_FORMAT, MdsReader
from flowception.shards.mixture import MixtureReader
from flowception.shards.reader import ShardReader
from flowception.shards.remote_cache import CacheConfig, is_url
from flowception.shards.remote_reader import RemoteReader
from flowception.shards.schema import ShardMeta


@dataclass(kw_only=True)
class SetShare:
    """One set of a mixture."""

    path: str
    """Folder or URL."""
    weight: float = 1.0
    """Expected times that an epoch shows each of its clips."""


@dataclass(kw_only=True)
class DataConfig:
    """Where data comes from and how it is read."""

    path: str | None = None
    """Folder or URL of the shard set; exactly one of ``path`` and ``mixture``."""
    mixture: list[SetShare] = field(default_factory=list)
    """Several sets and how often an epoch shows the clips of each: ``[{path: A, weight: 2}, {path: B}]``."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where remote shards are kept."""
    heldout_fraction: float = 0.0
    """Share of clips, by key hash, kept for validation."""
    num_workers: int = 0
    """Processes that read ahead, for each rank; 0 reads in the training process."""
    prefetch_steps: int = 2
    """Steps that each worker keeps ready."""
    max_bad_clips: int | None = 1000
    """Unreadable clips a run puts up with in an epoch, a few lost shards of the usual size; more is a fault of the
    storage and stops the run. None puts up with any number."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if bool(self.path) == bool(self.mixture):
            raise ConfigError(
                f"one of data.path and data.mixture must be given, got {shown(self.path)} and {len(self.mixture)} sets"
            )
        rules = {
            "heldout_fraction": number(at_least=0, below=1),
            "num_workers": integer(at_least=0),
            "prefetch_steps": integer(at_least=1),
            "max_bad_clips": integer(at_least=0).or_null("any number"),
        }
        check_ranges("data", self, rules)

    @property
    def sets(self) -> list[SetShare]:
        """The sets, one or more."""
        return self.mixture or [SetShare(path=self.path or "")]


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


def open_reader(config: DataConfig) -> DataReader:
    """The reader of what a run trains on: one set, or several as one.

    Raises:
        FlowceptionError: See ``open_set`` and ``MixtureReader``.
    """
    if not config.mixture:
        return open_set(config.sets[0].path, config.cache)
    readers = [open_set(share.path, config.cache) for share in config.sets]
    return MixtureReader(readers, [share.path for share in config.sets], [share.weight for share in config.sets])
