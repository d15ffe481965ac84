"""Headers of many video files, opened once for all tasks that encode one set.

The first task that needs headers reads them and stores them in a file in the set's folder. The other tasks wait for it
and read that file. A stored header is valid while its video has the same size and modification time. Unreadable headers
are stored too: a task that could read one later would have a different list of videos than the tasks before it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

from flowception.codecs.video_file import VideoHeader, read_header
from flowception.errors import ConfigError, DataError
from flowception.files import FileLock, write_atomically
from flowception.shards.writer import refused_writes_named

VideoSource = tuple[Path, float | None]
"""A file, or a folder of frames and its frame rate."""
_Kept = dict[VideoSource, tuple[list[int] | None, list[Any] | None]]
"""State and header of each video; the state is None if the file is missing, the header is None if it is unreadable."""
_Result = TypeVar("_Result")
logger = logging.getLogger(__name__)
HEADERS_NAME = "headers.jsonl"
_THREADS = 8


class HeaderReader:
    """Reads each header once."""

    def __init__(self, folder: Path | None = None) -> None:
        """Create a reader; nothing is read yet.

        Args:
            folder: Folder that stores the headers for all tasks; None stores them in this process only.
        """
        self._folder = folder
        self._read: dict[VideoSource, list[Any] | None] = {}

    def read(self, videos: Sequence[VideoSource]) -> list[VideoHeader | None]:
        """Read the header of each video; None for a video that cannot be read.

        Raises:
            ConfigError: If the folder cannot be written.
        """
        new = [video for video in dict.fromkeys(videos) if video not in self._read]
        if new and self._folder is None:
            self._read |= zip(new, _in_threads(_header, new), strict=True)
        elif new and self._folder is not None:
            path = self._folder / HEADERS_NAME
            with (
                FileLock(self._folder / f".{HEADERS_NAME}.lock", ConfigError, wait=True),
                refused_writes_named(self._folder),
            ):
                kept = _load(path)
                if changed := _bring_up_to_date(kept, new):
                    logger.info("read %d video headers", changed)
                    write_atomically(path, _dump(kept))
            self._read |= ((video, kept[video][1]) for video in new)
        return [None if (found := self._read[video]) is None else VideoHeader(*found) for video in videos]


def _bring_up_to_date(kept: _Kept, videos: Sequence[VideoSource]) -> int:
    """Read headers that are not stored or whose file has changed; return their number."""
    states = dict(zip(videos, _in_threads(_state, videos), strict=True))
    new = [video for video in videos if video not in kept or kept[video][0] != states[video]]
    for video, header in zip(new, _in_threads(_header, new), strict=True):
        kept[video] = states[video], header
    return len(new)


def _load(path: Path) -> _Kept:
    """Load the stored headers; none from a missing or damaged file, which will be rewritten."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {(Path(name), fps): (state, header) for name, fps, state, header in lines}
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _dump(kept: _Kept) -> str:
    return "".join(json.dumps([str(path), fps, *found]) + "\n" for (path, fps), found in kept.items())


def _state(video: VideoSource) -> list[int] | None:
    """Size and modification time of a file, which change with it; None if it is missing."""
    try:
        found = video[0].stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _header(video: VideoSource) -> list[Any] | None:
    try:
        return list(astuple(read_header(*video)))
    except DataError:
        return None


def _in_threads(action: Callable[[VideoSource], _Result], videos: Sequence[VideoSource]) -> list[_Result]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(action, videos))
