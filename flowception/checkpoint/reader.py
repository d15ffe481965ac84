"""Read checkpoints: find the newest valid one, verify it, load ranges or full parameters, hash the contents."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowception.checkpoint.file_hashes import is_read, sha256_bytes
from flowception.checkpoint.format import (
    FileRecord,
    Manifest,
    checkpoint_dir,
    checkpoints_dir,
    list_steps,
    read_manifest,
)
from flowception.errors import CheckpointError, CheckpointUnreadableError

logger = logging.getLogger(__name__)


def verify(
    folder: str | Path, part: int = 0, parts: int = 1, contents: bool = True, kinds: Sequence[str] | None = None
) -> Manifest:
    """Check a checkpoint's manifest, and the size and sha256 of every ``parts``-th file starting at ``part``.

    Args:
        folder: The checkpoint.
        part: Index of the share of files to read; the manifest is always read.
        parts: Number of shares, so that ranks can split the work.
        contents: Whether to read and hash the files; otherwise only their sizes are checked.
        kinds: Members of ``KINDS`` to verify; None for all.

    Returns:
        The manifest.

    Raises:
        CheckpointError: If anything is missing or altered, or cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in sorted(manifest.files)[part::parts]:
        try:
            _verify_file(folder / name, manifest.files[name], contents, kinds)
        except FileNotFoundError:
            raise CheckpointError(f"{folder / name} is missing; use an earlier checkpoint") from None
        except OSError as error:
            raise CheckpointUnreadableError(
                f"cannot read {folder / name} ({error.strerror}); check the storage"
            ) from error
    return manifest


def _verify_file(path: Path, record: FileRecord, contents: bool, kinds: Sequence[str] | None) -> None:
    size_bytes = path.stat().st_size
    if size_bytes != record.size_bytes:
        raise CheckpointError(
            f"{path} must have {record.size_bytes} bytes, as in its manifest, got {size_bytes}: it was truncated or "
            "altered; use an earlier checkpoint"
        )
    for piece in record.pieces if contents else ():
        if is_read(piece, kinds) and sha256_bytes(path, piece.start, piece.stop) != piece.sha256:
            raise CheckpointError(
                f"{path} is damaged: the sha256 of its {piece.kind} does not match; use an earlier checkpoint"
            )


def latest_valid(
    run_dir: str | Path, *, steps: Sequence[int] | None = None, check: Callable[[Path], object] = verify
) -> Path | None:
    """Find the newest valid checkpoint of a run, with a warning for each damaged one that is skipped.

    Args:
        run_dir: The run directory.
        steps: Steps of the run's checkpoints in ascending order, if already listed; None lists them.
        check: Raises CheckpointError for a damaged checkpoint; ranks that split the reading pass their own.

    Returns:
        Its folder, or None if the run has no checkpoint.

    Raises:
        CheckpointUnreadableError: If the newest undamaged checkpoint cannot be read at present.
        CheckpointError: If there are checkpoints and all are damaged.
    """
    steps = list_steps(run_dir) if steps is None else steps
    for step in reversed(steps):
        try:
            check(checkpoint_dir(run_dir, step))
        except CheckpointUnreadableError:
            raise
        except CheckpointError as error:
            logger.warning("skipping the checkpoint of step %d: %s", step, error)
        else:
            return checkpoint_dir(run_dir, step)
    if steps:
        raise CheckpointError(
            f"all {len(steps)} checkpoints in {checkpoints_dir(run_dir)} are damaged; "
            "remove the folder to start from scratch, or restore one from a backup"
        )
    return None


class SliceReader:
    """Reads ranges of parameters from one checkpoint, keeping files open between reads."""

    def __init__(self, folder: str | Path, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(folder)
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read elements ``start`` to ``stop`` of a flattened parameter.

        Args:
            kind: One of ``KINDS``.
            name: Parameter name.
            start: First element.
            stop: One past the last; None for all.

        Returns:
            float32 ``[stop - start]``.

        Raises:
            CheckpointError: If the checkpoint lacks the parameter or the file cannot be read.
        """
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.folder} has no parameter {name}: it is a checkpoint of another model")
        parameter = self.manifest.parameters[name]
        stop = math.prod(parameter.shape) if stop is None else stop
        result = torch.empty(stop - start)
        for piece in parameter.slices:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                try:
                    stored = self._file(piece.file).get_slice(f"{kind}/{name}")
                    result[low - start : high - start] = stored[low - piece.start : high - piece.start]
                except (OSError, SafetensorError, RuntimeError) as error:
                    raise CheckpointError(
                        f"cannot read {kind}/{name} of {self.folder / piece.file} ({error})"
                    ) from error
        return result

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def read_full(folder: str | Path, kind: Literal["weights", "ema"] = "ema") -> dict[str, Tensor]:
    """Read all parameters of a checkpoint in their full shapes, float32 on the CPU."""
    return dict(_full(SliceReader(folder), "weight" if kind == "weights" else kind))


def _full(reader: SliceReader, kind: str) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(reader.manifest.parameters):
        yield name, reader.read(kind, name).view(reader.manifest.parameters[name].shape)


def hashes(folder: str | Path) -> dict[str, str]:
    """Compute one sha256 each for weights, ema and optimizer, independent of how the state is sharded.

    A hash covers the name, shape and elements of each parameter, in the order of names. The optimizer's covers both
    moments and the number of optimizer steps.
    """
    reader = SliceReader(folder)
    contents = {"weights": ("weight",), "ema": ("ema",), "optimizer": ("exp_avg", "exp_avg_sq")}
    result = {}
    for title, kinds in contents.items():
        digest = hashlib.sha256()
        for kind in kinds:
            for name, tensor in _full(reader, kind):
                digest.update(f"{kind}/{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        if title == "optimizer":
            digest.update(f"steps {reader.manifest.state.get('optimizer_steps')}".encode())
        result[title] = digest.hexdigest()
    return result
