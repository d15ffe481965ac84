"""Hashes of a checkpoint file, one per tensor kind, so that a reader verifies only the kinds it loads.

safetensors orders tensors of one dtype by name, and names start with the kind, so each kind is one contiguous range of
bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HEADER = "header"
_BLOCK_BYTES = 1 << 22


class Piece(NamedTuple):
    """A byte range of a file, ``start`` to ``stop``, and its hash."""

    kind: str
    """One of ``format.KINDS``, or ``HEADER``."""
    start: int
    stop: int
    sha256: str


def sha256_bytes(path: Path, start: int, stop: int) -> str:
    """Hex sha256 of bytes ``start`` to ``stop`` of a file; fewer if the file ends before ``stop``."""
    digest, left = hashlib.sha256(), stop - start
    with path.open("rb") as stream:
        stream.seek(start)
        while left and (block := stream.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def hash_pieces(path: Path) -> list[Piece]:
    """Hash a safetensors file with tensors named ``KIND/PARAMETER``, reading every byte once.

    Args:
        path: The file.

    Returns:
        The header piece, then one piece per kind. Together they cover the file exactly.
    """
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    data = 8 + header_bytes
    kinds = sorted((entry["data_offsets"], name.split("/")[0]) for name, entry in header.items() if "/" in name)
    edges = [(HEADER, 0, data)]
    for kind, group in itertools.groupby(kinds, key=lambda item: item[1]):
        edges.append((kind, edges[-1][2], data + max(stop for (_, stop), _ in group)))
    return [Piece(kind, start, stop, sha256_bytes(path, start, stop)) for kind, start, stop in edges]


def is_read(piece: Piece, kinds: Sequence[str] | None) -> bool:
    """Whether a reader of the given kinds must verify a piece; None means all kinds."""
    return kinds is None or piece.kind in (HEADER, *kinds)


def cover(pieces: Sequence[Piece], size_bytes: int) -> bool:
    """Whether pieces cover a file from first to last byte without gaps."""
    edges = [0, *(piece.stop for piece in pieces)]
    return edges[:-1] == [piece.start for piece in pieces] and edges[-1] == size_bytes
