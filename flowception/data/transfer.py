"""Packs on their way from the host to the device, the next one while the one before computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from flowception.data.pack import Pack


@lru_cache(maxsize=1)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def packs_on_device(packs: Sequence[Pack], device: torch.device) -> Iterator[Pack]:
    """The packs of a step on a device, in order.

    On a GPU each is copied on a stream of its own, asked for before the one ahead of it begins to compute. A step's
    first pack has none ahead of it.

    Args:
        packs: On the host, in page-locked memory if the copy is not to hold up the host.
        device: Where they go.

    Yields:
        Each pack, ready for the current stream.
    """
    if device.type != "cuda":
        for pack in packs:
            yield pack.to(device)
        return
    copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
    coming = _begin_copy(packs[0], device, copying)
    for upcoming in [*packs[1:], None]:
        computing.wait_stream(copying)
        ready = coming
        ready.record_stream(computing)
        if upcoming is not None:
            coming = _begin_copy(upcoming, device, copying)
        yield ready


def _begin_copy(pack: Pack, device: torch.device, stream: torch.cuda.Stream) -> Pack:
    with torch.cuda.stream(stream):
        return pack.to(device, non_blocking=True)
