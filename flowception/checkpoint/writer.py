"""Write checkpoints atomically: each is complete or absent.

A save attempt is a folder ``step_NNNNNNNN.ATTEMPT.tmp``. Every writer stores its slices there in one file, followed by
a receipt with the file's hashes or the reason of its failure. When all receipts exist, one writer commits: it writes
the manifest, syncs, and renames the folder. Writers communicate only through files, without a process group. The name
of the attempt must be new in the run, so that leftovers of an earlier attempt are never mixed in.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flowception.checkpoint.file_hashes import Piece, hash_pieces
from flowception.checkpoint.format import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Parameter,
    Slice,
    checkpoint_dir,
    checkpoints_dir,
    list_steps,
)
from flowception.checkpoint.reader import verify
from flowception.errors import CheckpointError

_POLL_S = 0.05
_REPLACED, _PRUNED = "replaced.tmp", "pruned.tmp"


def attempt_dir(run_dir: str | Path, step: int, attempt: str) -> Path:
    """Folder of a save attempt for a step."""
    return checkpoints_dir(run_dir) / f"step_{step:08d}.{attempt}.tmp"


def make(folder: Path) -> Path:
    """Create the folder of an attempt, if no other writer has."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def discard(folder: Path) -> None:
    """Remove an attempt, ignoring errors."""
    shutil.rmtree(folder, ignore_errors=True)


def write_slices(
    folder: Path, writer: int, tensors: Mapping[str, Tensor], ranges: Mapping[str, tuple[tuple[int, ...], int, int]]
) -> None:
    """Write one writer's file and its receipt.

    Args:
        folder: Folder of the attempt.
        writer: Rank of this writer.
        tensors: Flat float32 tensors by ``KIND/PARAMETER``, with all kinds of every parameter in ``ranges``.
        ranges: (full shape, start, stop) by parameter.
    """
    name = f"rank_{writer:05d}.safetensors"
    path = folder / name
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise CheckpointError(f"cannot write {path}: {error}") from error
    _sync(path)
    receipt = {
        "file": name,
        "size_bytes": path.stat().st_size,
        "pieces": hash_pieces(path),
        "ranges": {key: [list(shape), start, stop] for key, (shape, start, stop) in ranges.items()},
    }
    _write_json(folder / _receipt_name(writer), receipt)


def write_failure(folder: Path, writer: int, reason: str) -> None:
    """Write the reason of a failure instead of a receipt, after removing this writer's file to free disk space."""
    (folder / f"rank_{writer:05d}.safetensors").unlink(missing_ok=True)
    _write_json(folder / _receipt_name(writer), {"failure": reason})


def wait_for_receipts(
    folder: Path,
    writers: int,
    timeout_s: Callable[[], float],
    *,
    clock_s: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> list[dict[str, Any]]:
    """Wait until every writer has written its receipt.

    Args:
        folder: Folder of the attempt.
        writers: Number of receipts to wait for.
        timeout_s: Returns the time limit in seconds; called at every poll.
        clock_s: Monotonic clock in seconds.
        pause: Sleeps for the given number of seconds.

    Returns:
        The receipts, in the order of writers.

    Raises:
        CheckpointError: If a writer failed or did not finish in time.
    """
    start_s = clock_s()
    while missing := _missing(folder, writers):
        if clock_s() - start_s > (limit_s := timeout_s()):
            noun = "rank" if len(missing) == 1 else "ranks"
            raise CheckpointError(
                f"{noun} {', '.join(map(str, missing[:8]))}{' and more' * (len(missing) > 8)} did not finish within "
                f"{limit_s:g} s; check the storage, or raise checkpoint.save_timeout_s"
            )
        pause(_POLL_S)
    receipts = [json.loads((folder / _receipt_name(writer)).read_text()) for writer in range(writers)]
    failures = [f"rank {writer}: {r['failure']}" for writer, r in enumerate(receipts) if "failure" in r]
    if failures:
        raise CheckpointError("; ".join(failures[:3]) + f"; and {len(failures) - 3} more" * (len(failures) > 3))
    return receipts


def _missing(folder: Path, writers: int) -> list[int]:
    present = set(os.listdir(folder))  # one listing, instead of one metadata request per rank
    return [writer for writer in range(writers) if _receipt_name(writer) not in present]


def _receipt_name(writer: int) -> str:
    return f"rank_{writer:05d}.receipt"


def commit(folder: Path, step: int, receipts: list[dict[str, Any]], state: dict[str, Any]) -> Path:
    """Join the receipts of all writers into a manifest and rename the attempt to its final name.

    Args:
        folder: Folder of the attempt.
        step: Step of the checkpoint.
        receipts: Receipts of all writers.
        state: State of the run, JSON-serializable.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: If the files do not match the receipts or do not cover every parameter.
    """
    files = {r["file"]: FileRecord(r["size_bytes"], tuple(Piece(*piece) for piece in r["pieces"])) for r in receipts}
    manifest = Manifest(step, _join_ranges(receipts), files, state)
    _write_json(folder / MANIFEST_NAME, manifest.to_json())
    verify(folder, contents=False)
    for path in folder.glob("*.receipt"):
        path.unlink()
    _sync(folder)
    target = folder.with_name(checkpoint_dir("", step).name)
    if target.exists():  # a damaged checkpoint of the same step, or the same state saved again
        aside = target.with_name(f"{target.name}.{_REPLACED}")
        target.rename(aside)
        try:
            folder.rename(target)
        except OSError:
            aside.rename(target)
            raise
        discard(aside)
    else:
        folder.rename(target)
    _sync(target.parent)
    return target


def _join_ranges(receipts: list[dict[str, Any]]) -> dict[str, Parameter]:
    shapes: dict[str, tuple[int, ...]] = {}
    slices: dict[str, list[Slice]] = {}
    for receipt in receipts:
        for name, (shape, start, stop) in receipt["ranges"].items():
            shapes[name] = tuple(shape)
            slices.setdefault(name, []).append(Slice(receipt["file"], start, stop))
    return {name: Parameter(shapes[name], tuple(sorted(slices[name], key=lambda s: s.start))) for name in shapes}


def remove_leftovers(run_dir: str | Path) -> None:
    """Remove the leftovers of killed jobs. Call only while holding the run's lock, before the first attempt.

    A checkpoint that was moved aside for a replacement that never completed is restored.
    """
    for replaced in checkpoints_dir(run_dir).glob(f"step_*.{_REPLACED}"):
        target = replaced.with_name(replaced.name.removesuffix(f".{_REPLACED}"))
        if not target.exists():
            replaced.rename(target)
    for left_over in checkpoints_dir(run_dir).glob("step_*.tmp"):
        shutil.rmtree(left_over)


def set_aside(run_dir: str | Path, newer_than: int) -> list[Path]:
    """Rename the checkpoints after a step, which resuming skipped, so that they are no longer listed.

    Args:
        run_dir: The run directory.
        newer_than: Step at which the run resumes.

    Returns:
        Their new paths, ``step_NNNNNNNN.damaged``, with a number appended if that name is taken.
    """
    moved = []
    for step in list_steps(run_dir):
        if step > newer_than:
            folder = checkpoint_dir(run_dir, step)
            names = itertools.chain(["damaged"], (f"damaged{number}" for number in itertools.count(2)))
            free = (target for name in names if not (target := folder.with_suffix(f".{name}")).exists())
            moved.append(folder.rename(next(free)))
    return moved


def prune(run_dir: str | Path, step: int, keep_last: int | None, keep_every_steps: int | None = None) -> list[int]:
    """Remove old checkpoints, after checking that the newest is complete.

    Args:
        run_dir: The run directory.
        step: Step just saved. Newer checkpoints can only be damaged; they are neither counted nor removed.
        keep_last: Number of newest checkpoints to keep; None removes nothing. Step 0 is always kept.
        keep_every_steps: Multiples of this step are kept too.

    Returns:
        Steps removed.

    Raises:
        CheckpointError: If the checkpoint just saved is incomplete; nothing is removed in that case.
    """
    if keep_last is None:
        return []
    verify(checkpoint_dir(run_dir, step), contents=False)
    old = [found for found in list_steps(run_dir) if 0 < found <= step][:-keep_last]
    old = [found for found in old if not (keep_every_steps and found % keep_every_steps == 0)]
    for found in old:
        _remove(run_dir, found)
    return old


def discard_newer(run_dir: str | Path, step: int) -> None:
    """Remove the checkpoints after a step to which the run was rolled back, newest first."""
    for found in reversed(list_steps(run_dir)):
        if found > step:
            _remove(run_dir, found)


def _remove(run_dir: str | Path, step: int) -> None:
    """Remove a checkpoint; if killed midway, nothing is left that looks like a checkpoint."""
    folder = checkpoint_dir(run_dir, step)
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.{_PRUNED}")))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file atomically, since other writers may be polling for it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content))
    _sync(partial)
    partial.rename(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
