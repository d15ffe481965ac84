"""What a rank can say of a hang that its main thread does not see: on CUDA a collective returns at once.

Every rank then stands still at the next line that reads a value from its GPU, whoever is to blame. Two things tell
more: whether the GPU has work left (a rank whose main thread hangs by itself has an idle one), and the flight record,
in which torch keeps the last collectives that a rank began and finished.

Both ask CUDA, which may itself never answer, and torch does not let go of the interpreter meanwhile. So both are asked
only when a hang is suspected, and a timer that needs no interpreter ends the process where no answer comes.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FLIGHT_RECORD = "collectives_rank_"
"""Beginning of a flight record's name, which ``torchfrtrace`` wants to know; the rank follows."""
_CUDA_TIMEOUT_S = 60.0


def gpu_is_busy(device: torch.device) -> bool:
    """Whether work that the main thread gave to its GPU is not done; a collective is such work. False without a GPU."""
    if device.type != "cuda":
        return False
    with _ended_without_answer():
        return not torch.cuda.default_stream(device).query()


def write_flight_record(folder: Path, rank: int) -> None:
    """Write the collectives of NCCL that this rank began of late, where torch was built with it."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None:
        with _ended_without_answer():
            record = dump()
        (folder / f"{FLIGHT_RECORD}{rank}").write_bytes(record)


@contextmanager
def _ended_without_answer() -> Iterator[None]:
    """Inside, the process has a limited time; then it prints the stacks and ends with exit code 1."""
    faulthandler.dump_traceback_later(_CUDA_TIMEOUT_S, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
