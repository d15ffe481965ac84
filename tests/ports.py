"""Ports for the jobs that tests start.

A port is chosen seconds before the job listens on it. So that nothing takes it meanwhile, it lies below the range from
which the kernel takes ports by itself (gloo's own listeners, every connection), no two pytest-xdist workers share a
range, and no port is given twice. Other ranges: Slurm's test jobs meet at 12000 + job number, ``benchmarks/faults.py``
takes 15000 to 20000.
"""

from __future__ import annotations

import os
import random
import socket

FIRST, LAST = 20_000, 32_000
WORKERS = 12
"""Workers of pytest-xdist that have separate port ranges."""
_given: set[int] = set()


def free_port() -> int:
    """A port without a listener."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """First of ``count`` consecutive ports without a listener."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    size = (LAST - FIRST) // WORKERS
    starts = range(FIRST + number * size, FIRST + (number + 1) * size - count + 1)
    for first in random.SystemRandom().sample(starts, len(starts)):
        ports = range(first, first + count)
        if _given.isdisjoint(ports) and all(map(_is_free, ports)):
            _given.update(ports)
            return first
    raise RuntimeError(f"no {count} free ports in a row among {starts.start} to {starts.stop + count - 2}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True
