"""A run directory's description of its model, data and code.

``config.yaml`` is the resolved configuration of the most recent start. ``manifest.json`` records what must not change
during a run, and how the run was made.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowception.config import FLAT
from flowception.errors import RunDirectoryError
from flowception.files import FileLock, write_atomically
from flowception.flow.extended_time import ProcessConfig
from flowception.nn.build import count_parameters
from flowception.nn.presets import DiTConfig
from flowception.shards.open import DataConfig
from flowception.shards.schema import ShardMeta

_MAY_CHANGE = {"attention_backend", "compile", "activation_checkpointing", "initial_log_rate"}
_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")


@dataclass(kw_only=True)
class RunConfig:
    """The part of a run's configuration that every user of the run needs; training extends it."""

    process: ProcessConfig = field(default_factory=ProcessConfig, metadata=FLAT)
    """The generative process that the model learns."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the forward and backward pass. Master weights and optimizer are always fp32."""
    data: DataConfig
    """The shard set and how to read it."""
    model: DiTConfig = field(default_factory=DiTConfig)
    """The network."""


def describe(model: DiTConfig, meta: ShardMeta) -> dict[str, Any]:
    """The content of ``manifest.json``."""
    return {
        "format_version": 1,
        **identity(model, meta),
        "parameters": count_parameters(model),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }


def identity(model: DiTConfig, meta: ShardMeta) -> dict[str, Any]:
    """The part of ``manifest.json`` that ``check`` compares."""
    return {"model": asdict(model.resolved()), "shards": json.loads(meta.to_json())}


def check(run_dir: str | Path, manifest: dict[str, Any]) -> None:
    """Check that a directory belongs to a run of the same model and latents.

    Args:
        run_dir: The run; it may be new.
        manifest: From ``describe`` or ``identity``.

    Raises:
        RunDirectoryError: If it does not, or its manifest cannot be read.
    """
    was = read(run_dir)
    if was is None:
        return
    for name, value in manifest["model"].items():
        if name not in _MAY_CHANGE and was["model"].get(name) != value:
            raise RunDirectoryError(
                f"{run_dir} was made by another model: model.{name} was {was['model'].get(name)} and is {value}; "
                "restore the old value, or choose another run_dir"
            )
    _check_codec(run_dir, was, manifest["shards"])


def check_codec(run_dir: str | Path, meta: ShardMeta, new_is_fine: bool = True) -> None:
    """Check that a shard set has the codec of a run.

    Args:
        run_dir: The run.
        meta: Metadata of the shard set to train on.
        new_is_fine: Whether to accept a directory without a manifest.

    Raises:
        RunDirectoryError: If codec or fingerprint differ, or the manifest is missing or cannot be read.
    """
    was = read(run_dir)
    if was is not None:
        _check_codec(run_dir, was, asdict(meta))
    elif not new_is_fine:
        raise RunDirectoryError(
            f"{run_dir} has no manifest.json, so its codec is unknown; use a complete run directory"
        )


def read(run_dir: str | Path) -> dict[str, Any] | None:
    """The manifest of a run; None for a new one.

    Raises:
        RunDirectoryError: If it cannot be read.
    """
    path = Path(run_dir) / "manifest.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); restore it, or choose another run_dir") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("model", "shards")):
        raise RunDirectoryError(
            f"{path} is damaged: model or shards is missing; restore the file, or choose another run_dir"
        )
    return found


def read_begun(run_dir: str | Path) -> dict[str, Any]:
    """The manifest of an existing run.

    Raises:
        RunDirectoryError: If the folder is not a run directory, or its manifest cannot be read.
    """
    found = read(run_dir)
    if found is None or not (Path(run_dir) / "config.yaml").is_file():
        raise RunDirectoryError(
            f"{run_dir} is not a run directory: config.yaml or manifest.json is missing; use the run_dir of a run "
            "started by train/main.py"
        )
    return found


def write(run_dir: str | Path, config_text: str, manifest: dict[str, Any]) -> None:
    """Write the description. An existing manifest is kept, because it records how the run started.

    Args:
        run_dir: The run.
        config_text: The resolved configuration as YAML.
        manifest: From ``describe``.

    Raises:
        RunDirectoryError: If it cannot be written.
    """
    folder = Path(run_dir)
    try:
        if not (folder / "manifest.json").is_file():
            write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        write_atomically(folder / "config.yaml", config_text)
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} cannot be written ({error}); free disk space or choose another run_dir"
        ) from error


def _check_codec(run_dir: str | Path, was: dict[str, Any], shards: dict[str, Any]) -> None:
    for name in ("codec", "codec_fingerprint"):
        if was["shards"].get(name) != shards[name]:
            raise RunDirectoryError(
                f"{run_dir} was trained on shards of {name} {was['shards'].get(name)}, but data.path has "
                f"{shards[name]}; use shards of the same codec, or another run directory"
            )


def lock(run_dir: str | Path) -> FileLock:
    """Lock a run directory for this job until the job ends, however it ends.

    Raises:
        RunDirectoryError: If another job holds it, or the folder cannot be written or locked.
    """
    advice = "wait for that job, stop it, or choose another run_dir"
    return FileLock(Path(run_dir) / "run.lock", RunDirectoryError, advice)


def _git_revision() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
