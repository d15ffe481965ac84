"""Cache of remote sets: complete shards on a local disk, shared by the processes of a node.

Any URL that fsspec supports works (``http://``, ``s3://``, ``gs://`` ...; extra ``remote``). Opening a set fetches and
verifies the description and the index. Shards are fetched when one of their clips is read, or earlier when the loader
prefetches them. One process fetches a file while the others wait (``flock``), under a temporary name until it is
complete. When the cache is full, the least recently used shards that no process has open are deleted.

``meta.json`` may change at its URL. A process accepts a copy whose fetch started after the process did. So the ranks of
a node, which all start before the first one opens a set, fetch it once, and a restarted run fetches it again. The hash
of the index is in ``meta.json``: a copy with that hash is never fetched again.

A fetch that stalls, breaks off, or ends early is retried with growing pauses. If all attempts fail, the clips of the
shard are bad clips like any others. The failure is recorded next to the shard. For a while, neither this process nor
those that waited for the shard request it again: their clips fail at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from flowception.errors import ConfigError, DataError, FlowceptionError, require
from flowception.files import FileLock, write_atomically
from flowception.ranges import check_ranges, integer, number

FIRST_PAUSE_S = 1.0
"""Pause before the second attempt; it doubles with each attempt."""
_FAILED_FOR_S = 60.0
"""Least time for which a failure is remembered; also at least twice the time that all attempts may take."""
_STARTED = time.time()
"""When this process started."""
_last_read: dict[Path, float] = {}
"""When this process last read each file that may change."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the local disk (full or not writable), which no remote raises."""


@dataclass(kw_only=True)
class CacheConfig:
    """How remote shards are fetched and kept."""

    cache_dir: str = "~/.cache/flowception"
    """Folder for remote shards, on a local disk of the node; all sets and ranks may share it."""
    cache_gb: float = 100.0
    """Largest size of the cache, in 10^9 bytes."""
    timeout_s: float = 30.0
    """Seconds without data after which a fetch counts as stalled."""
    attempts: int = 5
    """Attempts per fetch, with pauses of 1, 2, 4 ... s."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules = {"cache_gb": number(above=0), "timeout_s": number(above=0), "attempts": integer(at_least=1)}
        check_ranges("data.cache", self, rules)


def is_url(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


class ShardCache:
    """The cached files of one remote folder."""

    def __init__(self, url: str, config: CacheConfig, version: str = "") -> None:
        """Create the cache's folder.

        Args:
            url: The remote folder.
            config: Where the cache is and how large it may be.
            version: Distinguishes the sets that have been at this URL at different times.

        Raises:
            ConfigError: If the folder cannot be created.
        """
        self.url, self.config = url.rstrip("/"), config
        self._root = Path(config.cache_dir).expanduser()
        self.folder = self._root / sha256(f"{self.url}\n{version}".encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot create data.cache.cache_dir={config.cache_dir} ({error}); choose another folder"
            ) from error
        self._filesystem: tuple[int, Any] | None = None
        self._since = time.time()  # a restarted run ignores earlier failures
        pauses_s = FIRST_PAUSE_S * 2**config.attempts
        self._failed_for_s = max(_FAILED_FOR_S, 2 * (2 * config.timeout_s * config.attempts + pauses_s))

    def open_file(self, name: str, size: int) -> int:
        """Open a cached file, after fetching it if needed. The file stays in the cache until it is closed.

        Args:
            name: The file in the remote folder.
            size: Its size in bytes.

        Returns:
            The descriptor.

        Raises:
            DataError: If it cannot be fetched.
            ConfigError: If the cache is too small for all files that are open at once, or its disk is full.
        """
        path = self.folder / name
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(name, size)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink and os.fstat(descriptor).st_size == size:
                os.utime(path)
                return descriptor
            os.close(descriptor)  # deleted between opening and locking, or from another version of the set
            if path.exists() and path.stat().st_size != size:
                path.unlink(missing_ok=True)

    def fetch(self, name: str, size: int | None = None, *, since: float = 0.0) -> Path:
        """Ensure that a file is in the cache.

        Args:
            name: The file in the remote folder.
            size: Its size in bytes; None if unknown.
            since: Fetch the file again if the fetch of the cached copy started before this time.

        Returns:
            The cached file.

        Raises:
            DataError: If it cannot be fetched.
            ConfigError: If the cache is full or its disk fails.
        """
        path, partial = self.folder / name, self.folder / f".{name}.partial"
        with FileLock(_lock_of(path), DataError, wait=True), self._disk_errors_named():
            if path.exists() and size in (None, path.stat().st_size) and (not since or path.stat().st_mtime >= since):
                return path
            if reason := self._read_failure(name):
                raise DataError(reason)
            partial.unlink(missing_ok=True)
            if size is not None:
                self._make_room(size)
            started = time.time()
            self._fetch_with_retries(name, partial, size)
            os.utime(partial, (started, started))
            _sync(partial)
            partial.replace(path)
            self._failure(name).unlink(missing_ok=True)
        return path

    def read_newest(self, name: str) -> bytes:
        """Content of a file that may change, fetched since this process started or last read it."""
        path = self.folder / name
        content = self.fetch(name, since=_last_read.get(path, _STARTED)).read_bytes()
        _last_read[path] = time.time()
        return content

    def place(self, name: str, content: bytes) -> None:
        """Store the content of a file that was already fetched."""
        path = self.folder / name
        with FileLock(_lock_of(path), DataError, wait=True), self._disk_errors_named():
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, content)

    @contextmanager
    def _disk_errors_named(self) -> Iterator[None]:
        """Turn an ``OSError`` of the local disk into a ``ConfigError`` that names the cache."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"disk error in the cache {self._root} ({error.strerror or error}); free space there, lower "
                "data.cache.cache_gb, or set another data.cache.cache_dir"
            ) from error

    def _failure(self, name: str) -> Path:
        """The record of a failure: the time, then the reason. Read and written under the file's lock."""
        return self.folder / f".{name}.failed"

    def _read_failure(self, name: str) -> str:
        """Why a recent fetch of a file failed; empty if none did."""
        path = self._failure(name)
        if not path.exists():
            return ""
        when, reason = path.read_text().split("\n", 1)
        return reason if self._since <= float(when) and time.time() - float(when) < self._failed_for_s else ""

    def drop(self, name: str) -> None:
        """Delete a file with wrong bytes, so that it is fetched again. Happens once per run and node."""
        dropped = self.folder / f".{name}.dropped"
        with FileLock(_lock_of(self.folder / name), DataError, wait=True), self._disk_errors_named():
            if dropped.exists() and float(dropped.read_text()) >= self._since:
                return
            write_atomically(dropped, str(time.time()))
            (self.folder / name).unlink(missing_ok=True)

    def _fetch_with_retries(self, name: str, partial: Path, size: int | None) -> None:
        pause_s, reason = FIRST_PAUSE_S, ""
        for attempt in range(self.config.attempts):
            if attempt:
                time.sleep(pause_s)
                pause_s *= 2
            try:
                self._remote().get_file(f"{self._remote_root}/{name}", str(partial))
                found = partial.stat().st_size
                if size is None or found == size:
                    return
                reason = f"received {found} of {size} bytes"
            except FileNotFoundError:
                reason = "not found"
                break
            except Exception as error:  # every remote filesystem has its own errors
                if isinstance(error, FlowceptionError) or getattr(error, "errno", None) in _DISK_ERRORS:
                    partial.unlink(missing_ok=True)
                    raise
                reason = str(error) or type(error).__name__
        partial.unlink(missing_ok=True)
        attempts = f"{attempt + 1} attempt{'s' * (attempt > 0)}"
        text = f"cannot fetch {self.url}/{name} after {attempts} ({reason}); check the remote"
        write_atomically(self._failure(name), f"{time.time()}\n{text}")
        raise DataError(text)

    def _remote(self) -> Any:
        """The remote filesystem, one per process because it does not survive a fork."""
        if self._filesystem is None or self._filesystem[0] != os.getpid():
            fsspec = require("fsspec", extra="remote")
            options: dict[str, Any] = {"skip_instance_cache": True}
            if self.url.startswith("http"):
                aiohttp = require("aiohttp", extra="remote")
                limit_s = self.config.timeout_s
                options["client_kwargs"] = {
                    "timeout": aiohttp.ClientTimeout(total=None, sock_connect=limit_s, sock_read=limit_s)
                }
            try:
                remote, self._remote_root = fsspec.core.url_to_fs(self.url, **options)
            except (ImportError, ValueError) as error:
                raise ConfigError(f"cannot open data.path={self.url} ({error}); install its package") from error
            self._filesystem = (os.getpid(), remote)
        return self._filesystem[1]

    def _make_room(self, size: int) -> None:
        """Delete the least recently used shards that no process has open, until ``size`` more bytes fit."""
        limit = int(self.config.cache_gb * 1e9)
        with FileLock(self._root / ".evict.lock", DataError, wait=True):
            known = sorted(_held(path) for path in (*self._root.glob("*/*.tar"), *self._root.glob("*/.*.tar.partial")))
            total = sum(entry[1] for entry in known)
            for _, held, path in known:
                if total + size <= limit:
                    return
                if _delete_stale_partial(path) if path.suffix == ".partial" else _delete_unless_open(path):
                    total -= held
        if total + size > limit:
            raise ConfigError(
                f"the cache in {self._root} is full of shards in use: {total} of {limit} bytes, {size} more needed; "
                "raise data.cache.cache_gb"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystem": None}


def _sync(path: Path) -> None:
    """Wait until a file is on disk, so that after a crash of the node no partial shard has the final name."""
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


def _lock_of(path: Path) -> Path:
    """The lock held while a file is fetched or dropped."""
    return path.with_name(f".{path.name}.lock")


def _held(path: Path) -> tuple[float, int, Path]:
    """A file's last use, size in bytes, and path; zeros if another process has deleted it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0.0, 0, path
    return found.st_mtime, found.st_size, path


def _delete_unless_open(path: Path) -> bool:
    try:
        with _descriptor(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass  # another process deleted it first
    return True


def _delete_stale_partial(path: Path) -> bool:
    """Delete the partial file of a killed process, but not one that is being fetched now."""
    final = path.with_name(path.name.removeprefix(".").removesuffix(".partial"))
    try:
        with FileLock(_lock_of(final), DataError):
            path.unlink(missing_ok=True)
    except DataError:
        return False
    return True


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
