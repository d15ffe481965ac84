"""Headers of many video files, each opened once by all the tasks that encode one set.

The first task that needs them reads them and keeps them in a file of the set's folder; the others wait for it and read
that. A header is believed while its file has the size and the time of change that it had. One that cannot be read is
kept too: a task that could read it later would have another list of videos than those before.
"""

from __future__ import annotations

import json
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
"""State and header of each video; None where it is not there, and where it cannot be read."""
_Result = TypeVar("_Result")
HEADERS_NAME = "headers.jsonl"
_THREADS = 8


class HeaderReader:
    """Reads headers, each once."""

    def __init__(self, folder: Path | None = None) -> None:
        """Read nothing yet.

        Args:
            folder: Where what was read is kept, for all tasks; None keeps it in this process alone.
        """
        self._folder = folder
        self._read: dict[VideoSource, list[Any] | None] = {}

    def read(self, videos: Sequence[VideoSource]) -> list[VideoHeader | None]:
        """The header of each video; None for one that cannot be read.

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
                    print(f"read {changed} video headers", flush=True)
                    write_atomically(path, _dump(kept))
            self._read |= ((video, kept[video][1]) for video in new)
        return [None if (found := self._read[video]) is None else VideoHeader(*found) for video in videos]


def _bring_up_to_date(kept: _Kept, videos: Sequence[VideoSource]) -> int:
    """Read what is not kept, or of another state; how many these were."""
    states = dict(zip(videos, _in_threads(_state, videos), strict=True))
    new = [video for video in videos if video not in kept or kept[video][0] != states[video]]
    for video, header in zip(new, _in_threads(_header, new), strict=True):
        kept[video] = states[video], header
    return len(new)


def _load(path: Path) -> _Kept:
    """What is kept; nothing of a damaged file, which is written anew."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {(Path(name), fps): (state, header) for name, fps, state, header in lines}
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _dump(kept: _Kept) -> str:
    return "".join(json.dumps([str(path), fps, *found]) + "\n" for (path, fps), found in kept.items())


def _state(video: VideoSource) -> list[int] | None:
    """What changes when a file does."""
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
