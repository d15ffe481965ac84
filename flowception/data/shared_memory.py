"""Sending packs from a worker to the training process, with all tensors of a step in one block of shared memory.

torch by default passes shared memory by file descriptor. The memory has no name, so a killed process leaves nothing in
/dev/shm. But each block takes a descriptor, and a step has thousands of tensors, so they share one block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowception.data.pack import Pack

_ALIGNMENT_BYTES = 64


class _Place(NamedTuple):
    """Position of a tensor in the block."""

    dtype: torch.dtype
    shape: torch.Size
    start: int


@dataclass
class SentPacks:
    """The packs of one rank's step, as sent by a worker."""

    block: Tensor
    """uint8, the bytes of all tensors."""
    frames: list[Pack]
    """The packs, with a ``_Place`` instead of each tensor."""

    @classmethod
    def of(cls, packs: Sequence[Pack]) -> SentPacks:
        """Gather packs into one block."""
        tensors: list[Tensor] = []
        ends = [0]

        def take(tensor: Tensor) -> _Place:
            start = -(-ends[-1] // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            tensors.append(tensor)
            ends.append(start + tensor.numel() * tensor.element_size())
            return _Place(tensor.dtype, tensor.shape, start)

        frames = [pack.with_leaves(Tensor, take) for pack in packs]
        block = torch.empty(ends[-1], dtype=torch.uint8)
        for tensor, end in zip(tensors, ends[1:], strict=True):
            size_bytes = tensor.numel() * tensor.element_size()
            block[end - size_bytes : end] = tensor.contiguous().view(-1).view(torch.uint8)
        return cls(block, frames)

    def packs(self) -> list[Pack]:
        """Rebuild the packs; their tensors are views of the block."""
        return [frame.with_leaves(_Place, self._tensor) for frame in self.frames]

    def pin_memory(self) -> list[Pack]:
        """The packs in page-locked memory. The DataLoader's thread calls this if there is a GPU."""
        return [pack.pin_memory() for pack in self.packs()]

    def _tensor(self, place: _Place) -> Tensor:
        size_bytes = math.prod(place.shape) * place.dtype.itemsize
        return self.block[place.start : place.start + size_bytes].view(place.dtype).view(place.shape)
