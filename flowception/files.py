"""Files shared by several processes: atomic writes, and locks that are released when their holder dies."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from flowception.errors import FlowceptionError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content atomically. It is on disk when this returns. The folder must exist."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


class FileLock:
    """A lock held by one process until it is released or the process ends, even by SIGKILL.

    It is a kernel lock (``flock``), so it never becomes stale. The file names the holder.
    """

    def __init__(self, path: Path, error: type[FlowceptionError], advice: str = "", *, wait: bool = False) -> None:
        """Take the lock.

        Args:
            path: The lock file; it and its folder are created.
            error: Exception class to raise if another process holds the lock.
            advice: Remedy for its message.
            wait: Wait for the lock instead of raising.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take(wait)
            self._stream.truncate(0)
            self._stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._stream.flush()
        except BlockingIOError:
            holder = self._stream.read().strip() or "another process"
            self._stream.close()
            raise error(f"{path.parent} is in use by {holder}; {advice}") from None
        except OSError as reason:
            raise error(
                f"{path} cannot be created or locked ({reason.strerror or reason}); choose a writable folder on a "
                "filesystem that supports flock"
            ) from reason
        _held.add(self)

    def _take(self, wait: bool) -> None:
        self._stream = self._path.open("a+")
        self._stream.seek(0)
        fcntl.flock(self._stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def release(self) -> None:
        """Release the lock. The empty file stays, so that all waiters wait for the same file."""
        _held.discard(self)
        self._stream.truncate(0)
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()
"""Locks that this process holds."""


def _close_in_child() -> None:
    """Keep a forked process from holding locks: the kernel releases a lock when its last copy is closed."""
    for lock in list(_held):
        lock._stream.close()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
