"""Runs a function in a forked process with a time limit, so that a crash, hang or out-of-memory affects no other check.

The parent has imported the slow modules and must not have used a GPU: CUDA does not survive a fork. Each child leads
its own process group, and the rest of the group is killed when it ends.
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
    """Its exit code, or minus the number of the signal that killed it; None if it was killed at its limit."""
    seconds: float
    last_line: str
    """The last line of its output, empty if none."""

    def reason(self, limit_s: float) -> str:
        """Why it failed."""
        output = f"; last output: {self.last_line}" if self.last_line else ""
        if self.code is None:
            return f"killed at its limit of {limit_s:.4g} s{output}"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}{output}"
        return f"exited with {self.code}{output}"


def run_in_child(function: Callable[[], object], limit_s: float, log: Path, own_group: bool = True) -> Ending:
    """Fork, run the function and wait for it.

    Args:
        function: Function for the child; it writes its results to files.
        limit_s: Seconds after which the child and its descendants are killed.
        log: File for its output.
        own_group: Whether it leads a process group. A grandchild must not, so that it is killed with its parent.

    Returns:
        How it ended.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_child(function, log, own_group)
    code = _wait(pid, started + limit_s)
    seconds = time.monotonic() - started
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if own_group:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # remaining descendants
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
            os._exit(code)  # always: a child must never continue as its parent


def _wait(pid: int, deadline: float) -> int | None:
    """The exit code; None if the child is still running at the deadline."""
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
