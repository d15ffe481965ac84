"""Copying packs from host to device, overlapped with the computation of the previous pack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from flowception.data.pack import Pack


@lru_cache(maxsize=1)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def packs_on_device(packs: Sequence[Pack], device: torch.device) -> Iterator[Pack]:
    """Move the packs of a step to a device, in order.

    On a GPU, a separate stream copies each pack, starting before the previous pack computes. The copy of a step's first
    pack overlaps with nothing.

    Args:
        packs: Packs on the host, in page-locked memory so that the copy does not block the host.
        device: Target device.

    Yields:
        Each pack, ready for the current stream.
    """
    if device.type != "cuda":
        for pack in packs:
            yield pack.to(device)
        return
    copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
    copied = _start_copy(packs[0], device, copying)
    for upcoming in [*packs[1:], None]:
        computing.wait_stream(copying)
        ready = copied
        ready.record_stream(computing)
        if upcoming is not None:
            copied = _start_copy(upcoming, device, copying)
        yield ready


def _start_copy(pack: Pack, device: torch.device, stream: torch.cuda.Stream) -> Pack:
    with torch.cuda.stream(stream):
        return pack.to(device, non_blocking=True)
