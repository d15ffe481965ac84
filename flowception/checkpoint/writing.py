"""Writes a checkpoint so that it is complete or absent.

Every writer puts its slices into one file of a temporary folder and then a receipt with the file's hash. When all
receipts are there, one of them commits: it writes the manifest, syncs, and renames the folder. Nothing here needs a
process group; the callers decide how they wait for each other.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flowception.checkpoint.format import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Parameter,
    Slice,
    checkpoint_dir,
    checkpoints_dir,
    list_steps,
    sha256_file,
)
from flowception.errors import CheckpointError


def temporary_dir(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is put together."""
    return checkpoints_dir(run_dir) / f"step_{step:08d}.tmp"


def begin(run_dir: str | Path, step: int) -> Path:
    """Make an empty temporary folder; what killed jobs left behind is removed. One writer calls this first."""
    checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
    for left_over in checkpoints_dir(run_dir).glob("step_*.tmp"):
        shutil.rmtree(left_over)
    folder = temporary_dir(run_dir, step)
    folder.mkdir()
    return folder


def write_slices(
    folder: Path, writer: int, tensors: Mapping[str, Tensor], ranges: Mapping[str, tuple[tuple[int, ...], int, int]]
) -> None:
    """Write one writer's file and its receipt.

    Args:
        folder: The temporary folder.
        writer: Number of this writer, its rank.
        tensors: ``KIND/PARAMETER`` to a flat float32 tensor, all kinds for every parameter in ``ranges``.
        ranges: Parameter to (full shape, start, stop).
    """
    name = f"rank_{writer:05d}.safetensors"
    path = folder / name
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    _sync(path)
    receipt = {
        "file": name,
        "size_bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "ranges": {key: [list(shape), start, stop] for key, (shape, start, stop) in ranges.items()},
    }
    _write_json(folder / f"rank_{writer:05d}.receipt", receipt)


def commit(run_dir: str | Path, step: int, writers: int, state: dict[str, Any]) -> Path:
    """Join the receipts of all writers to a manifest and make the checkpoint appear.

    Args:
        run_dir: The run.
        step: Step of the checkpoint.
        writers: How many receipts there must be.
        state: JSON-able state of the run.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: If a receipt is missing.
    """
    folder = temporary_dir(run_dir, step)
    receipts = []
    for writer in range(writers):
        path = folder / f"rank_{writer:05d}.receipt"
        if not path.is_file():
            raise CheckpointError(f"rank {writer} did not finish its part of the checkpoint of step {step}")
        receipts.append(json.loads(path.read_text()))
    files = {r["file"]: FileRecord(r["size_bytes"], r["sha256"]) for r in receipts}
    manifest = Manifest(step, _join_ranges(receipts), files, state)
    _write_json(folder / MANIFEST_NAME, manifest.to_json())
    for path in folder.glob("*.receipt"):
        path.unlink()
    _sync(folder)
    target = checkpoint_dir(run_dir, step)
    if target.exists():  # a damaged one of the same step, or the same state saved again
        aside = target.with_name(f"step_{step:08d}.old.tmp")
        target.rename(aside)
        folder.rename(target)
        shutil.rmtree(aside)
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


def set_aside(run_dir: str | Path, newer_than: int) -> list[Path]:
    """Rename the checkpoints after a step, which resuming passed over, so that they are counted as none any more.

    Args:
        run_dir: The run.
        newer_than: The step that the run resumes at.

    Returns:
        Their new names, ``step_NNNNNNNN.damaged`` or with a number behind.
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
    """Remove old checkpoints.

    Args:
        run_dir: The run.
        step: The one just saved; newer ones, which can only be damaged, are neither counted nor removed.
        keep_last: Newest ones kept; None removes nothing. Step 0 is kept besides.
        keep_every_steps: Multiples of this are kept besides.

    Returns:
        Steps removed.
    """
    if keep_last is None:
        return []
    old = [found for found in list_steps(run_dir) if 0 < found <= step][:-keep_last]
    old = [found for found in old if not (keep_every_steps and found % keep_every_steps == 0)]
    for found in old:
        doomed = checkpoint_dir(run_dir, found).rename(checkpoints_dir(run_dir) / f"step_{found:08d}.old.tmp")
        shutil.rmtree(doomed)
    return old


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
