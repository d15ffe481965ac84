"""The cache of sets behind a URL: whole shards on a disk of the node, whose processes share it.

Any URL that fsspec knows (``http://``, ``s3://``, ``gs://`` ...; extra ``remote``). The description and the index are
fetched when the set is opened and verified as always; shards follow when a clip of them is wanted, or a little earlier
because the loader says which come next. A file is fetched by one process while the others wait for it (``flock``),
under another name until it is whole. When the cache is full, shards that no process has open are deleted, those used
longest ago first.

``meta.json`` may change behind its URL. A process takes a copy that another one has begun to fetch since it began
itself, so the ranks of a node, which all begin before the first one opens a set, fetch it once, and a run that starts
again fetches it anew. The index has its hash in ``meta.json``: a copy with that hash is never fetched again.

A fetch that stalls, breaks off or ends early is tried again with growing pauses. If it fails for good, the clips of
the shard are bad clips like any others. The failure is noted beside the shard's place, so that for a while the shard
is not asked for again, neither by this process nor by those that waited for it: their clips fail at once.
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
"""Before the second attempt; it doubles with each."""
_FAILED_FOR_S = 60.0
"""A failure holds for so long at least, and for twice as long as all attempts may take."""
_BEGAN = time.time()
"""When this process began."""
_taken: dict[Path, float] = {}
"""When this process last took a copy of a file that may change."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What no remote raises: the local disk is full or cannot be written."""


@dataclass(kw_only=True)
class CacheConfig:
    """How remote shards are fetched and kept."""

    cache_dir: str = "~/.cache/flowception"
    """Folder for remote shards, on a disk of the node; all sets and ranks may share it."""
    cache_gb: float = 100.0
    """Size it may reach, in 10^9 bytes."""
    timeout_s: float = 30.0
    """A remote that sends nothing for so long has stalled."""
    attempts: int = 5
    """How often a fetch is tried, with pauses of 1, 2, 4 ... s."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        rules = {"cache_gb": number(above=0), "timeout_s": number(above=0), "attempts": integer(at_least=1)}
        check_ranges("data.cache", self, rules)


def is_url(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


class ShardCache:
    """The cached files of one remote folder."""

    def __init__(self, url: str, config: CacheConfig, version: str = "") -> None:
        """Make the cache's folder.

        Args:
            url: The remote folder.
            config: Where and how much.
            version: What tells apart the sets that were behind this URL at one time or another.
        """
        self.url, self.config = url.rstrip("/"), config
        self._root = Path(config.cache_dir).expanduser()
        self.folder = self._root / sha256(f"{self.url}\n{version}".encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.cache.cache_dir={config.cache_dir} cannot be made ({error}); set another"
            ) from error
        self._filesystem: tuple[int, Any] | None = None
        self._since = time.time()  # a run that starts again does not take over what failed before
        pauses_s = FIRST_PAUSE_S * 2**config.attempts
        self._failed_for_s = max(_FAILED_FOR_S, 2 * (2 * config.timeout_s * config.attempts + pauses_s))

    def open_file(self, name: str, size: int) -> int:
        """A descriptor of a cached file, fetched if it is not there; until it is closed the file stays.

        Args:
            name: The file in the remote folder.
            size: Its bytes.

        Raises:
            DataError: If it cannot be fetched.
            ConfigError: If the cache is too small for the files that are open at one time, or its disk is full.
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
            os.close(descriptor)  # deleted between opening and locking, or of another version of the set
            if path.exists() and path.stat().st_size != size:
                path.unlink(missing_ok=True)

    def fetch(self, name: str, size: int | None = None, *, since: float = 0.0) -> Path:
        """Make sure that a file is in the cache.

        Args:
            name: The file in the remote folder.
            size: Its bytes; None where they are not known.
            since: A copy whose fetching began before this time is fetched anew.

        Returns:
            Where it is.

        Raises:
            DataError: If it cannot be fetched.
            ConfigError: If the cache is full or its disk fails.
        """
        path, partial = self.folder / name, self.folder / f".{name}.partial"
        with FileLock(_lock_of(path), DataError, wait=True), self._disk_is_to_blame():
            if path.exists() and size in (None, path.stat().st_size) and (not since or path.stat().st_mtime >= since):
                return path
            if reason := self._read_failure(name):
                raise DataError(reason)
            partial.unlink(missing_ok=True)
            if size is not None:
                self._make_room(size)
            began = time.time()
            self._fetch_patiently(name, partial, size)
            os.utime(partial, (began, began))
            _sync(partial)
            partial.replace(path)
            self._failure(name).unlink(missing_ok=True)
        return path

    def read_newest(self, name: str) -> bytes:
        """A file that may change, as it was at some time since this process began, or since it last read it."""
        path = self.folder / name
        content = self.fetch(name, since=_taken.get(path, _BEGAN)).read_bytes()
        _taken[path] = time.time()
        return content

    def place(self, name: str, content: bytes) -> None:
        """Put a file into the cache that was fetched already."""
        path = self.folder / name
        with FileLock(_lock_of(path), DataError, wait=True), self._disk_is_to_blame():
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, content)

    @contextmanager
    def _disk_is_to_blame(self) -> Iterator[None]:
        """Turn an ``OSError`` of the local disk into an error that names it."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"the disk of the cache in {self._root} fails ({error.strerror or error}); free space there, lower "
                "data.cache.cache_gb, or set another data.cache.cache_dir"
            ) from error

    def _failure(self, name: str) -> Path:
        """The note of a failure: when, and a line that says what. Read and written under the file's lock."""
        return self.folder / f".{name}.failed"

    def _read_failure(self, name: str) -> str:
        """Why a file could not be fetched a short while ago; empty if that is not known."""
        path = self._failure(name)
        if not path.exists():
            return ""
        when, reason = path.read_text().split("\n", 1)
        return reason if self._since <= float(when) and time.time() - float(when) < self._failed_for_s else ""

    def drop(self, name: str) -> None:
        """Delete a file whose bytes are wrong, so that it is fetched again; once for each run and node."""
        dropped = self.folder / f".{name}.dropped"
        with FileLock(_lock_of(self.folder / name), DataError, wait=True), self._disk_is_to_blame():
            if dropped.exists() and float(dropped.read_text()) >= self._since:
                return
            write_atomically(dropped, str(time.time()))
            (self.folder / name).unlink(missing_ok=True)

    def _fetch_patiently(self, name: str, partial: Path, size: int | None) -> None:
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
                reason = f"{found} bytes came, it has {size}"
            except FileNotFoundError:
                reason = "it is not there"
                break
            except Exception as error:  # every remote filesystem has errors of its own
                if isinstance(error, FlowceptionError) or getattr(error, "errno", None) in _DISK_ERRORS:
                    partial.unlink(missing_ok=True)
                    raise
                reason = str(error) or type(error).__name__
        partial.unlink(missing_ok=True)
        text = f"{self.url}/{name} could not be fetched in {attempt + 1} attempts ({reason}); check the remote"
        write_atomically(self._failure(name), f"{time.time()}\n{text}")
        raise DataError(text)

    def _remote(self) -> Any:
        """The remote filesystem, one for each process: they do not survive a fork."""
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
                raise ConfigError(f"data.path={self.url} cannot be opened ({error}); install the package") from error
            self._filesystem = (os.getpid(), remote)
        return self._filesystem[1]

    def _make_room(self, size: int) -> None:
        """Delete shards that no process has open, those used longest ago first, until ``size`` more bytes fit."""
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
                f"the cache in {self._root} is full of shards in use: {total} of {limit} bytes, {size} more wanted; "
                "raise data.cache.cache_gb"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystem": None}


def _sync(path: Path) -> None:
    """Wait until a file is on disk: after a crash of the node a name must not stand for half a shard."""
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


def _lock_of(path: Path) -> Path:
    """The lock of who fetches or drops a file."""
    return path.with_name(f".{path.name}.lock")


def _held(path: Path) -> tuple[float, int, Path]:
    """When a file was used last, its bytes, and itself; nothing if another process has deleted it."""
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
        pass  # another process was faster
    return True


def _delete_stale_partial(path: Path) -> bool:
    """Delete what a killed process left half fetched; not what one is fetching now."""
    whole = path.with_name(path.name.removeprefix(".").removesuffix(".partial"))
    try:
        with FileLock(_lock_of(whole), DataError):
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
