"""Decoding many videos in several processes, in order, despite videos that crash or hang a decoder.

Without workers, videos are decoded in this process, one after another.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

from data_prep.encoder.clip_cutter import CutSettings, CutVideo, cut_video
from flowception.errors import DataError

Decoder = Callable[[Path, CutSettings], CutVideo]
Decoded = CutVideo | str
"""A video's clips, or the reason why it has none."""
_QUEUED_PER_WORKER = 2
"""Videos in flight or decoded per worker; bounds the memory."""
CRASHED = "the decoder crashed"
HUNG = "the decoder took longer than decode_timeout_s and was killed"


class _HungDecoderError(Exception):
    """A decoder took too long, and the processes of its pool were killed."""


def decode_videos(
    videos: Sequence[tuple[Path, CutSettings]],
    num_workers: int,
    decoder: Decoder = cut_video,
    timeout_s: float | None = None,
) -> Generator[Decoded, None, None]:
    """Decode videos.

    Args:
        videos: Video files, with their cut settings.
        num_workers: Processes; 0 decodes in this process, where a crash of the decoder ends the job.
        decoder: Function that cuts one video; must be picklable.
        timeout_s: Longest wait for one video, after which its decoder is killed. None waits forever, as does decoding
            in this process.

    Yields:
        For each video, in order, its clips or the reason why it has none.
    """
    if num_workers == 0:
        yield from (_decode(decoder, path, settings) for path, settings in videos)
        return
    pool, waiting, at = _new_pool(num_workers), deque[tuple[tuple[Path, CutSettings], Future[Decoded]]](), 0
    try:
        while waiting or at < len(videos):
            while at < len(videos) and len(waiting) < _QUEUED_PER_WORKER * num_workers:
                waiting.append((videos[at], _submit(pool, decoder, *videos[at])))
                at += 1
            video, future = waiting.popleft()
            try:
                yield _result(pool, future, timeout_s)
            except (BrokenProcessPool, _HungDecoderError) as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, _HungDecoderError):
                    yield f"{video[0]}: {HUNG}"
                else:  # A crash of one worker fails all videos in flight. Retry the first one alone.
                    yield _decode_alone(decoder, *video, timeout_s)
                pool = _new_pool(num_workers)
                waiting = deque((v, f if _succeeded(f) else _submit(pool, decoder, *v)) for v, f in waiting)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _decode(decoder: Decoder, path: Path, settings: CutSettings) -> Decoded:
    try:
        return decoder(path, settings)
    except DataError as error:
        return str(error)


def _decode_alone(decoder: Decoder, path: Path, settings: CutSettings, timeout_s: float | None) -> Decoded:
    with _new_pool(1) as pool:
        try:
            return _result(pool, pool.submit(_decode, decoder, path, settings), timeout_s)
        except BrokenProcessPool:
            return f"{path}: {CRASHED}"
        except _HungDecoderError:
            return f"{path}: {HUNG}"


def _result(pool: ProcessPoolExecutor, future: Future[Decoded], timeout_s: float | None) -> Decoded:
    """The result of a video. If it takes too long, kill the pool's processes: a hung one reacts to nothing else."""
    wait_for([future], timeout_s)
    if future.done():
        return future.result()
    for process in list(pool._processes.values()):
        process.kill()
    raise _HungDecoderError


def _submit(pool: ProcessPoolExecutor, decoder: Decoder, path: Path, settings: CutSettings) -> Future[Decoded]:
    try:
        return pool.submit(_decode, decoder, path, settings)
    except BrokenProcessPool as error:
        failed: Future[Decoded] = Future()
        failed.set_exception(error)
        return failed


def _succeeded(future: Future[Decoded]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _new_pool(num_workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: this process runs torch's threads and perhaps CUDA.
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_die_with_parent)


def _die_with_parent() -> None:
    """End this worker when the encoding process ends for any reason."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
