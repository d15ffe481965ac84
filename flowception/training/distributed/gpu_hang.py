"""Diagnose a hang on CUDA, where collectives return at once and the stacks do not show which rank is at fault.

Every rank then blocks at the next line that reads a value from its GPU. Two things tell more: whether the GPU has work
left (a rank whose main thread hangs by itself has an idle GPU), and the flight record, where torch keeps the latest
collectives that a rank started and finished.

Both call CUDA, which may never return, and torch holds the GIL during the call. So they are called only when a hang is
suspected, under a timer that ends the process without needing the GIL.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FLIGHT_RECORD = "collectives_rank_"
"""File name prefix of flight records, followed by the rank; ``torchfrtrace`` needs it as ``-p``."""
_CUDA_TIMEOUT_S = 60.0


def gpu_is_busy(device: torch.device) -> bool:
    """Whether the GPU still has work, including collectives, from the main thread. False without a GPU."""
    if device.type != "cuda":
        return False
    with _ended_without_answer():
        return not torch.cuda.default_stream(device).query()


def write_flight_record(folder: Path, rank: int) -> None:
    """Write this rank's recent NCCL collectives, if torch was built with NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None:
        with _ended_without_answer():
            record = dump()
        (folder / f"{FLIGHT_RECORD}{rank}").write_bytes(record)


@contextmanager
def _ended_without_answer() -> Iterator[None]:
    """Limit the time of the block; on timeout the process prints its stacks and ends with exit code 1."""
    faulthandler.dump_traceback_later(_CUDA_TIMEOUT_S, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
