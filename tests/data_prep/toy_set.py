"""An encoding job of the toy videos, and what is in the set that it makes."""

from dataclasses import replace
from pathlib import Path

from data_prep.encoder.config import EncodeConfig

ROOT = Path(__file__).resolve().parents[2]


def toy_config(source, out, **changes) -> EncodeConfig:
    return replace(EncodeConfig(source=str(source), out=str(out), height=16, width=16, videos_per_shard=5), **changes)


def bytes_of(folder) -> dict[str, bytes]:
    """Every file of a set; the locks of its parts stay behind, empty, and are no part of it."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.suffix != ".lock"}
