"""What a checkpoint is on disk, and how it is found, verified and read.

::

    RUN/checkpoints/step_00001000/
        rank_00000.safetensors    flat float32 slices named KIND/PARAMETER, KIND one of ``KINDS``
        rank_00001.safetensors    ...
        manifest.json             every parameter's shape and slices, every file's size and hashes, the run's state

A slice holds elements ``start`` to ``stop`` of the flattened parameter, without padding; the slices of a parameter
cover it exactly. So a checkpoint says nothing about ranks: any world size and any ZeRO stage reads the ranges it
needs. A directory of this name is complete: it was written under another name, synced and renamed. Which checkpoint is
the latest is found by verifying, never read from a pointer. Each kind in a file has a sha256 of its own (``pieces``):
generation verifies and reads EMA weights alone. Nothing here needs a process group, and nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowception.checkpoint.pieces import WHOLE, Piece, cover, is_read, sha256_bytes
from flowception.errors import CheckpointError, CheckpointUnreadableError

FORMAT_VERSION = 2
"""Version 1 had one sha256 a file; it is read too."""
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
MANIFEST_NAME = "manifest.json"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_FILE_NAME = re.compile(r"rank_\d{5,}\.safetensors")


class Slice(NamedTuple):
    """Elements ``start`` to ``stop`` of a flattened parameter lie in ``file``."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Parameter:
    """A parameter's full shape and where its elements lie, in order."""

    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size_bytes: int
    pieces: tuple[Piece, ...]
    """They cover the file."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    step: int
    parameters: dict[str, Parameter]
    files: dict[str, FileRecord]
    state: dict[str, Any]
    """The run's state: optimizer steps, cursor, quarantine, fingerprints, counters."""

    def to_json(self) -> dict[str, Any]:
        """As JSON, with a checksum of its own."""
        order = sorted(self.files)
        number = {name: i for i, name in enumerate(order)}
        content = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "state": self.state,
            "files": [[name, self.files[name].size_bytes, list(map(list, self.files[name].pieces))] for name in order],
            "parameters": {
                name: {"shape": list(p.shape), "slices": [[number[s.file], s.start, s.stop] for s in p.slices]}
                for name, p in sorted(self.parameters.items())
            },
        }
        return content | {"checksum": _checksum(content)}


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def checkpoint_dir(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint of one step."""
    return checkpoints_dir(run_dir) / f"step_{step:08d}"


def list_steps(run_dir: str | Path) -> list[int]:
    """Steps of a run's checkpoints in ascending order, whole or damaged.

    Raises:
        CheckpointError: If the folder cannot be read.
    """
    folder = checkpoints_dir(run_dir)
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}); check the storage") from error
    return sorted(int(match[1]) for match in map(_STEP_NAME.fullmatch, names) if match)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises:
        CheckpointError: If there is none, it was altered, or its slices do not cover their parameters.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
        version = content["format_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: it is no complete checkpoint") from None
    except OSError as error:
        raise CheckpointUnreadableError(f"{path} cannot be read ({error.strerror}); check the storage") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an earlier checkpoint") from error
    if checksum != _checksum(content):
        raise CheckpointError(f"{path} is damaged: its checksum does not match; use an earlier checkpoint")
    if version not in (1, FORMAT_VERSION):
        raise CheckpointUnreadableError(
            f"{path} has format version {version}, this code reads 1 to {FORMAT_VERSION}; use its release"
        )
    names = [name for name, _, _ in content["files"]]
    if bad := [name for name in names if not _FILE_NAME.fullmatch(name)]:
        raise CheckpointError(f"{path} names the file {bad[0]!r}; only rank_NNNNN.safetensors is allowed")
    parameters = {
        name: Parameter(tuple(p["shape"]), tuple(Slice(names[file], start, stop) for file, start, stop in p["slices"]))
        for name, p in content["parameters"].items()
    }
    for name, parameter in parameters.items():
        _check_cover(path, name, parameter)
    files = {}
    for name, size_bytes, hashed in content["files"]:
        whole = [(WHOLE, 0, size_bytes, hashed)]
        files[name] = FileRecord(size_bytes, tuple(Piece(*piece) for piece in (whole if version == 1 else hashed)))
        if not cover(files[name].pieces, size_bytes):
            raise CheckpointError(f"{path}: the hashes of {name} do not cover its {size_bytes} bytes")
    return Manifest(content["step"], parameters, files, content["state"])


def _check_cover(path: Path, name: str, parameter: Parameter) -> None:
    at = 0
    for piece in parameter.slices:
        if piece.start != at or piece.stop <= piece.start:
            raise CheckpointError(f"{path}: the slices of {name} do not join at element {at}")
        at = piece.stop
    if at != math.prod(parameter.shape):
        raise CheckpointError(f"{path}: the slices of {name} hold {at} of {math.prod(parameter.shape)} elements")


def verify(
    folder: str | Path, part: int = 0, parts: int = 1, contents: bool = True, kinds: Sequence[str] | None = None
) -> Manifest:
    """Check a checkpoint's manifest, and every ``parts``-th file from ``part`` on, by size and sha256.

    Args:
        folder: The checkpoint.
        part: Which share of the files to read; the manifest is always read.
        parts: Number of shares, so that ranks can share the reading.
        contents: Whether to read the files; else their sizes alone are checked.
        kinds: Of ``KINDS``, those that will be read, and so must be right; None for all.

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
                f"{folder / name} cannot be read ({error.strerror}); check the storage"
            ) from error
    return manifest


def _verify_file(path: Path, record: FileRecord, contents: bool, kinds: Sequence[str] | None) -> None:
    size_bytes = path.stat().st_size
    if size_bytes != record.size_bytes:
        raise CheckpointError(
            f"{path} has {size_bytes} bytes, its manifest says {record.size_bytes}: it was cut short or altered; use "
            "an earlier checkpoint"
        )
    for piece in record.pieces if contents else ():
        if is_read(piece, kinds) and sha256_bytes(path, piece.start, piece.stop) != piece.sha256:
            raise CheckpointError(
                f"{path} is damaged: the sha256 of its {piece.kind} does not match; use an earlier checkpoint"
            )


def latest_valid(
    run_dir: str | Path,
    report: Callable[[str], None] | None = None,
    *,
    steps: Sequence[int] | None = None,
    check: Callable[[Path], object] = verify,
) -> Path | None:
    """The newest checkpoint of a run that is whole.

    Args:
        run_dir: The run.
        report: Called with a line for each damaged checkpoint that is passed over.
        steps: The run's checkpoints in ascending order, where the caller listed them; None lists them.
        check: Raises CheckpointError for a damaged checkpoint; ranks that share the reading give their own.

    Returns:
        Its folder, or None if the run has no checkpoint at all.

    Raises:
        CheckpointUnreadableError: If the newest that is not damaged cannot be read at present.
        CheckpointError: If there are checkpoints and every one is damaged.
    """
    steps = list_steps(run_dir) if steps is None else steps
    for step in reversed(steps):
        try:
            check(checkpoint_dir(run_dir, step))
        except CheckpointUnreadableError:
            raise
        except CheckpointError as error:
            if report:
                report(f"checkpoint of step {step} is passed over: {error}")
        else:
            return checkpoint_dir(run_dir, step)
    if steps:
        raise CheckpointError(
            f"all {len(steps)} checkpoints in {checkpoints_dir(run_dir)} are damaged; "
            "remove the folder to start the run afresh, or restore one from a backup"
        )
    return None


class SliceReader:
    """Reads ranges of parameters from one checkpoint; files stay open between reads."""

    def __init__(self, folder: str | Path, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(folder)
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` of a flattened parameter.

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
            raise CheckpointError(f"{self.folder} has no parameter {name}: it belongs to another model")
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
                    raise CheckpointError(f"{self.folder / piece.file}: cannot read {kind}/{name} ({error})") from error
        return result

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def read_full(folder: str | Path, kind: Literal["weights", "ema"] = "ema") -> dict[str, Tensor]:
    """All parameters of a checkpoint in their full shapes, float32 on the CPU."""
    return dict(_full(SliceReader(folder), "weight" if kind == "weights" else kind))


def _full(reader: SliceReader, kind: str) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(reader.manifest.parameters):
        yield name, reader.read(kind, name).view(reader.manifest.parameters[name].shape)


def hashes(folder: str | Path) -> dict[str, str]:
    """One sha256 each for weights, ema and optimizer; the same state has the same hashes however it was sharded.

    A hash covers, for each parameter in the order of names, its name, shape and elements; the optimizer's covers both
    moments and the number of its steps.
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
