"""Configuration of an encoding job on the toy videos, and the content of the set it writes."""

from dataclasses import replace
from pathlib import Path

from data_prep.encoder.config import EncodeConfig

ROOT = Path(__file__).resolve().parents[2]


def toy_config(source, out, **changes) -> EncodeConfig:
    return replace(EncodeConfig(source=str(source), out=str(out), height=16, width=16, videos_per_shard=5), **changes)


def bytes_of(folder) -> dict[str, bytes]:
    """Content of every file of a set, without the empty lock files that jobs leave."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.suffix != ".lock"}
