"""The checkpoint format on disk; ``reader`` finds, verifies and reads checkpoints.

::

    RUN/checkpoints/step_00001000/
        rank_00000.safetensors    flat float32 slices named KIND/PARAMETER, KIND one of ``KINDS``
        rank_00001.safetensors    ...
        manifest.json             every parameter's shape and slices, every file's size and hashes, the run's state

A slice holds elements ``start`` to ``stop`` of the flattened parameter, without padding, and the slices of a parameter
cover it exactly. The format is therefore independent of ranks: any world size and any ZeRO stage reads the ranges it
needs. A directory of this name is complete, because it is written under another name, synced and renamed. The latest
checkpoint is found by verification, not read from a pointer. Each kind in a file has a separate sha256
(``file_hashes``), so generation verifies and reads only EMA weights. Nothing here needs a process group or pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flowception.checkpoint.file_hashes import Piece, cover
from flowception.errors import CheckpointError, CheckpointUnreadableError

FORMAT_VERSION = 2
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
MANIFEST_NAME = "manifest.json"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_FILE_NAME = re.compile(r"rank_\d{5,}\.safetensors")


class Slice(NamedTuple):
    """Elements ``start`` to ``stop`` of a flattened parameter, stored in ``file``."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Parameter:
    """A parameter's full shape and its slices, in order."""

    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class FileRecord:
    """Expected size and hashes of a file."""

    size_bytes: int
    pieces: tuple[Piece, ...]
    """Pieces that cover the file."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    step: int
    parameters: dict[str, Parameter]
    files: dict[str, FileRecord]
    state: dict[str, Any]
    """The run's state: optimizer steps, cursor, quarantine, fingerprints, counters."""

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON, with a checksum of the content."""
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
    """Steps of a run's checkpoints in ascending order, complete or damaged.

    Raises:
        CheckpointError: If the folder cannot be read.
    """
    folder = checkpoints_dir(run_dir)
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder} ({error.strerror}); check the storage") from error
    return sorted(int(match[1]) for match in map(_STEP_NAME.fullmatch, names) if match)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises:
        CheckpointError: If it is missing or altered, or its slices do not cover their parameters.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
        version = content["format_version"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}: it is not a complete checkpoint; use another"
        ) from None
    except OSError as error:
        raise CheckpointUnreadableError(f"cannot read {path} ({error.strerror}); check the storage") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an earlier checkpoint") from error
    if checksum != _checksum(content):
        raise CheckpointError(f"{path} is damaged: its checksum does not match; use an earlier checkpoint")
    if version != FORMAT_VERSION:
        raise CheckpointUnreadableError(
            f"{path} must have format version {FORMAT_VERSION}, got {version!r}; read it with the version of "
            "Flowception that wrote it"
        )
    names = [name for name, _, _ in content["files"]]
    if bad := [name for name in names if not _FILE_NAME.fullmatch(name)]:
        raise CheckpointError(f"{path}: file names must be rank_NNNNN.safetensors, got {bad[0]!r}")
    parameters = {
        name: Parameter(tuple(p["shape"]), tuple(Slice(names[file], start, stop) for file, start, stop in p["slices"]))
        for name, p in content["parameters"].items()
    }
    for name, parameter in parameters.items():
        _check_cover(path, name, parameter)
    files = {}
    for name, size_bytes, hashed in content["files"]:
        files[name] = FileRecord(size_bytes, tuple(Piece(*piece) for piece in hashed))
        if not cover(files[name].pieces, size_bytes):
            raise CheckpointError(f"{path}: the hashes of {name} do not cover its {size_bytes} bytes")
    return Manifest(content["step"], parameters, files, content["state"])


def _check_cover(path: Path, name: str, parameter: Parameter) -> None:
    at = 0
    for piece in parameter.slices:
        if piece.start != at or piece.stop <= piece.start:
            raise CheckpointError(f"{path}: the slices of {name} have a gap or overlap at element {at}")
        at = piece.stop
    if at != math.prod(parameter.shape):
        raise CheckpointError(f"{path}: the slices of {name} cover {at} of {math.prod(parameter.shape)} elements")
