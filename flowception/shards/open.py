"""The ``data`` section of a configuration, and opening its sets: tars or MDS, local or remote, one or several."""

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
    """Mean number of times that an epoch shows each of its clips."""


@dataclass(kw_only=True)
class DataConfig:
    """Which data to train on and how to read it."""

    path: str | None = None
    """Folder or URL of the shard set. Set exactly one of ``path`` and ``mixture``."""
    mixture: list[SetShare] = field(default_factory=list)
    """Several sets, and how often an epoch shows the clips of each: ``[{path: A, weight: 2}, {path: B}]``."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Cache of remote shards."""
    heldout_fraction: float = 0.0
    """Fraction of clips, chosen by key hash, held out for validation."""
    num_workers: int = 0
    """Reader processes per rank; 0 reads in the training process."""
    prefetch_steps: int = 2
    """Steps that each worker prefetches."""
    max_bad_clips: int | None = 1000
    """Unreadable clips allowed per epoch, about a few lost shards of the usual size. More points to a storage fault and
    stops the run. None allows any number."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if bool(self.path) == bool(self.mixture):
            raise ConfigError(
                f"exactly one of data.path and data.mixture must be set, got {shown(self.path)} and "
                f"{len(self.mixture)} sets"
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
"""A reader of a run's training data."""


def open_set(path: str | Path, cache: CacheConfig | None = None) -> ShardReader | MdsReader:
    """Open a set.

    Args:
        path: Folder of a set of tars or of an MDS set, or the URL of a set of tars.
        cache: Cache of remote shards, used for a URL; None for the defaults.

    Returns:
        The reader.

    Raises:
        FlowceptionError: If the set does not exist, is incomplete or damaged, or a package for it is missing.
    """
    if is_url(str(path)):
        return RemoteReader(str(path), cache or CacheConfig())
    if ShardMeta.load(Path(path)).format == MDS_FORMAT:
        return MdsReader(path)
    return ShardReader(path)


def open_reader(config: DataConfig) -> DataReader:
    """Open a run's training data: one set, or a mixture.

    Raises:
        FlowceptionError: See ``open_set`` and ``MixtureReader``.
    """
    if not config.mixture:
        return open_set(config.sets[0].path, config.cache)
    readers = [open_set(share.path, config.cache) for share in config.sets]
    return MixtureReader(readers, [share.path for share in config.sets], [share.weight for share in config.sets])
