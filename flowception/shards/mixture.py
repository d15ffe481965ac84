"""Several sets as one. Each set's weight is the mean number of times that an epoch shows each of its clips.

An epoch shows a clip of a set with weight 2.3 twice, and a third time with probability 0.3. A clip of a set with weight
0.5 appears in half of the epochs. The draw depends on the seed, the epoch, and the clip, so it is part of the plan and
the same on every rank. Each appearance in an epoch has its own place in the order, and so its own global time. Delays
and noise are the same for all appearances in an epoch.

Shape legend: ``M`` clips of all sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flowception.errors import DataError
from flowception.ranges import number
from flowception.shards.index import ClipIndex
from flowception.shards.reader import ClipReader
from flowception.shards.schema import NO_CLASS, ShardMeta, same_text


class SetReader(ClipReader, Protocol):
    """A reader with the index and description of its set."""

    index: ClipIndex
    meta: ShardMeta


class MixtureReader:
    """Reads clips of several sets by their rows in one index."""

    def __init__(self, readers: Sequence[SetReader], names: Sequence[str], weights: Sequence[float]) -> None:
        """Join sets.

        Args:
            readers: One per set.
            names: Names of the sets for errors.
            weights: Mean number of times that an epoch shows each clip of a set.

        Raises:
            ConfigError: If a weight is not a positive number.
            DataError: If the sets have different codecs, text encoders, or class names, or share a key.
        """
        for name, weight in zip(names, weights, strict=True):
            number(above=0, note="to drop a set, remove it from the mixture").check(f"the weight of {name}", weight)
        for reader, name in zip(readers, names, strict=True):
            _check_alike(readers[0], reader, names[0], name)
        self.meta = replace(readers[0].meta, class_names=_common_class_names(readers, names))
        self._readers = list(readers)
        self._starts = np.cumsum([0, *(len(reader.index) for reader in readers)])
        self.index = _join([reader.index for reader in readers])
        self.index.weights = np.repeat(np.asarray(weights, np.float64), [len(reader.index) for reader in readers])
        self._check_keys(names)

    def _check_keys(self, names: Sequence[str]) -> None:
        order = np.argsort(self.index.clips["clip_id"], kind="stable")
        ids = self.index.clips["clip_id"][order]
        twice = np.flatnonzero(ids[1:] == ids[:-1])
        if len(twice):
            first, second = int(order[twice[0]]), int(order[twice[0] + 1])
            sets = [names[int(np.searchsorted(self._starts, row, side="right")) - 1] for row in (first, second)]
            raise DataError(
                f"clip {self.index.key(first)} is in both {sets[0]} and {sets[1]}; keys must be unique within a mixture"
            )

    @property
    def text_width(self) -> int | None:
        """D of text embeddings; None if the sets have no text."""
        return self.meta.text_width

    @property
    def null_text(self) -> Tensor | None:
        """The text of a clip without a caption or condition, bfloat16 [L, D]; None if the sets have no text."""
        return self._readers[0].null_text

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.meta.latent_channels

    def _find(self, row: int) -> tuple[SetReader, int]:
        if not 0 <= row < len(self.index):
            raise DataError(f"row {row} is not in the mixture, which has {len(self.index)} clips")
        which = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._readers[which], row - int(self._starts[which])

    def read_clip(self, row: int, frames: ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Some latent frames of a clip and its text; see ``ShardReader.read_clip``."""
        reader, row_in_set = self._find(row)
        return reader.read_clip(row_in_set, frames)

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        """Prepare to read some clips soon."""
        which = np.searchsorted(self._starts, rows, side="right") - 1
        for k in np.unique(which).tolist():
            self._readers[k].prefetch(rows[which == k] - self._starts[k])

    def describe(self, row: int) -> str:
        """A clip and its file, for messages."""
        reader, row_in_set = self._find(row)
        return reader.describe(row_in_set)


def _check_alike(first: SetReader, other: SetReader, first_name: str, other_name: str) -> None:
    """Raise ``DataError`` if two sets have different codecs or text encoders."""
    for field in ("codec", "codec_fingerprint", "latent_channels", "text_width"):
        ours, theirs = getattr(first.meta, field), getattr(other.meta, field)
        if ours != theirs:
            raise DataError(
                f"{other_name} has {field} {theirs!r}, but {first_name} has {ours!r}; encode all sets of a mixture "
                "with the same codec and text encoder"
            )
    ours, theirs = first.null_text, other.null_text
    if ours is not None and theirs is not None and not same_text(ours, theirs):
        raise DataError(
            f"{other_name} and {first_name} have different null texts (embeddings of the empty caption), of shapes "
            f"{tuple(theirs.shape)} and {tuple(ours.shape)}; encode all sets of a mixture with the same text encoder"
        )


def _common_class_names(readers: Sequence[SetReader], names: Sequence[str]) -> list[str]:
    """The class names that the sets share; a set without classes fits any."""
    named = [(reader.meta.class_names, name) for reader, name in zip(readers, names) if reader.meta.class_names]
    if not named:
        return []
    (wanted, origin), *others = named
    for found, name in others:
        if found != wanted:
            raise DataError(
                f"{name} and {origin} have different class names, so a label would mean two things; encode all sets of "
                "a mixture with the same class names"
            )
    for reader, name in zip(readers, names):
        if not reader.meta.class_names and np.any(reader.index.clips["class_label"] != NO_CLASS):
            raise DataError(
                f"{name} has class labels but no class names, while {origin} has names, so a label could mean two "
                f"things; encode {name} again with class names"
            )
    return wanted


def _join(parts: Sequence[ClipIndex]) -> ClipIndex:
    """One index, with distinct shard numbers for each set."""
    joined = ClipIndex.concatenate(parts)
    shards = np.cumsum([0, *(int(part.clips["shard"].max(initial=0)) + 1 for part in parts)])
    joined.clips["shard"] += np.repeat(shards[:-1], [len(part) for part in parts]).astype(np.uint32)
    return joined
