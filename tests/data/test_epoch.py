"""Freed memory is returned to the OS."""

import subprocess
import sys

import pytest

HOLES = """
from pathlib import Path
from flowception.data.epoch import return_freed_memory

def own_mb():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024

blocks = [bytes([number % 255 + 1]) * 4096 for number in range(25_000)]
last = blocks.pop()  # above the others, so that the heap cannot simply shrink
del blocks
before = own_mb()
return_freed_memory()
print(before - own_mb(), len(last))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_blocks_below_a_live_one_are_returned():
    done = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True, timeout=240)
    returned_mb, _ = done.stdout.split()
    assert float(returned_mb) > 80  # of 98
