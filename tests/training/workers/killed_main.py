"""``train/main.py`` in a forked process, perhaps with a SIGKILL at a place of a save.

PLACE is the operation of ``checkpoint.writer`` after which rank RANK dies, in its SAVE-th save, counted from 1. After
``half_written`` its file holds half of its bytes. The rank dies only when its saves before have been committed, which
another rank does in its own time.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from flowception.checkpoint import writer

MAIN = Path(__file__).parents[3] / "train" / "main.py"
PATIENCE_S = 120


def kill_after(name: str, save: int, before_the_end) -> None:
    real, attempts = getattr(writer, name), []

    def watched(*arguments, **named):
        result = real(*arguments, **named)
        attempts.append(attempt_of(arguments))
        if len(attempts) == save:
            before_the_end(*arguments)
            for attempt in attempts[:-1]:
                wait_until_committed(attempt)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(writer, name, watched)


def attempt_of(arguments) -> Path:
    """The attempt's folder: the first argument, or where the file is that is the second."""
    return Path(arguments[0]) if isinstance(arguments[0], Path) else Path(arguments[1]).parent


def wait_until_committed(attempt: Path) -> None:
    checkpoint, deadline = attempt.with_name(attempt.name.split(".")[0]), time.monotonic() + PATIENCE_S
    while not checkpoint.is_dir():
        assert time.monotonic() < deadline, f"{checkpoint} did not come in {PATIENCE_S} s"
        time.sleep(0.01)


def cut_in_half(tensors, path) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def main(prepared: tuple[str, int, int] | None, config: str) -> None:
    """Train; ``prepared`` is (PLACE, RANK, SAVE). The process ends with the exit code of ``train/main.py``."""
    if prepared is not None:
        place, rank, save = prepared
        if rank == int(os.environ["RANK"]):
            if place == "half_written":
                kill_after("save_file", save, cut_in_half)
            else:
                kill_after(place, save, lambda *arguments: None)
    sys.argv = [str(MAIN), "--config", config]
    runpy.run_path(str(MAIN), run_name="__main__")
