"""Running a function in a forked process with a time limit, so that a fault, a hang or a full memory spoils no other.

The process that forks has imported what is slow to import and must never have touched a GPU: CUDA does not survive a
fork. A child leads a process group of its own, and what is left of the group is ended with it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

_POLL_S = 0.02


class Ending(NamedTuple):
    """How a child ended."""

    code: int | None
    """Its exit code, minus the number of the signal that ended it; None where it was ended at its limit."""
    seconds: float
    last_words: str
    """The last line that it wrote, empty if none."""

    def reason(self, limit_s: float) -> str:
        """Why it is no success."""
        words = f"; its last words: {self.last_words}" if self.last_words else ""
        if self.code is None:
            return f"ended at its limit of {limit_s:.4g} s{words}"
        if self.code < 0:
            return f"died of {signal.Signals(-self.code).name}{words}"
        return f"left with {self.code}{words}"


def run_in_child(function: Callable[[], object], limit_s: float, log: Path, own_group: bool = True) -> Ending:
    """Fork, run the function and wait for it.

    Args:
        function: What the child runs; it says what it found in files of its own.
        limit_s: Seconds after which the child and all its own children are killed.
        log: File for what it prints.
        own_group: Whether it leads a process group. A child of a child must not, so that it ends with that.

    Returns:
        How it ended.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_child(function, log, own_group)
    code = _wait(pid, began + limit_s)
    seconds = time.monotonic() - began
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if own_group:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it left behind
    return Ending(code, seconds, _last_line(log))


def _be_child(function: Callable[[], object], log: Path, own_group: bool) -> NoReturn:
    code = 1
    try:
        if own_group:
            os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        function()
        code = 0
    except BaseException:
        with suppress(Exception):
            traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # whatever happened: a child must never go on as its parent


def _wait(pid: int, deadline: float) -> int | None:
    """The exit code; None if the child is still there at the deadline."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_S)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
