"""Writing a shard set: webdataset tars with an index, each shard complete or absent.

A shard is written under a temporary name, synced, and renamed. Its part of the index follows in the same way, and only
then does the shard count as finished. So a killed encoder resumes at the first unfinished shard. ``finish`` joins the
parts and writes ``meta.json`` last: a folder without it is not a set. Rewriting a shard of a finished set removes
``meta.json`` first.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception.errors import DataError
from flowception.files import write_atomically
from flowception.shards.index import CLIP_DTYPE, ClipIndex
from flowception.shards.schema import (
    JSON_SUFFIX,
    LATENTS_SUFFIX,
    META_NAME,
    NO_CLASS,
    TEXT_SUFFIX,
    ClipRecord,
    NullText,
    ShardFile,
    ShardMeta,
    checksum,
    checksums,
    clip_id,
    same_text,
)

HEADER_BYTES = tarfile.BLOCKSIZE
_IDENTITY_NAME = "encoding.json"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


def padded_bytes(size: int) -> int:
    """Bytes that a payload takes in a tar, padded to blocks of 512."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def bf16_bytes(values: Tensor) -> bytes:
    """Little-endian bfloat16 bytes of a tensor."""
    return values.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def refused_writes_named(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, read-only, broken) into an error that names the file.

    Args:
        path: File being written, used if the ``OSError`` has no file name.

    Raises:
        DataError: In place of ``OSError``, with the file, the reason, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or path} ({error.strerror or error}); free or repair the disk and run "
            "the same command again: it continues at the first unfinished shard"
        ) from error


def _member(name: str, payload: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header + payload + bytes(padded_bytes(len(payload)) - len(payload))


@dataclass
class _ShardWriter:
    """Writes one shard's clips to a file and collects their index rows."""

    file: io.BufferedWriter
    shard: int
    meta: ShardMeta
    rows: list[NDArray[np.void]] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def write(self, record: ClipRecord) -> None:
        frames, channels, height, width = record.latents.shape
        if channels != self.meta.latent_channels:
            raise DataError(f"clip {record.key} has {channels} channels, but the set has {self.meta.latent_channels}")
        text_width = None if record.text is None else record.text.shape[1]
        if record.text is not None and text_width != self.meta.text_width:
            raise DataError(f"clip {record.key} has text of width {text_width}, but the set has {self.meta.text_width}")
        described = json.dumps(record.metadata(), sort_keys=True).encode()
        prefix = _member(f"{record.key}.{JSON_SUFFIX}", described)
        if record.text is not None and len(record.text):
            prefix += _member(f"{record.key}.{TEXT_SUFFIX}", bf16_bytes(record.text))
        latents = bf16_bytes(record.latents)
        member = _member(f"{record.key}.{LATENTS_SUFFIX}", latents)
        prefix += member[:HEADER_BYTES]
        row = np.zeros((), CLIP_DTYPE)
        row["clip_id"], row["shard"], row["checksum_start"] = clip_id(record.key), self.shard, len(self.checksums)
        row["start"] = self.file.tell()
        row["latents_offset"] = self.file.tell() + len(prefix)
        row["frames"], row["height"], row["width"] = frames, height, width
        row["text_tokens"] = 0 if record.text is None else len(record.text)
        row["class_label"] = NO_CLASS if record.class_label is None else record.class_label
        row["json_bytes"], row["prefix_checksum"] = len(described), checksum(prefix)
        self.file.write(prefix)
        self.file.write(member[HEADER_BYTES:])
        frame_bytes = len(latents) // frames
        self.checksums.extend(checksums(memoryview(latents), frame_bytes))
        self.rows.append(row)
        self.keys.append(record.key)

    def part(self) -> ClipIndex:
        rows = np.array(self.rows, dtype=CLIP_DTYPE) if self.rows else np.zeros(0, CLIP_DTYPE)
        keys = np.array([key.encode() for key in self.keys]) if self.keys else np.zeros(0, "S1")
        return ClipIndex(rows, np.array(self.checksums, dtype=np.uint32), keys)


class ShardSetWriter:
    """Writes the shards of one set, in any order and over any number of runs."""

    def __init__(self, folder: Path | str, meta: ShardMeta) -> None:
        """Start or continue a set.

        Args:
            folder: The set's folder; created if missing.
            meta: Codec, text encoder, and class names of the set. ``finish`` fills in counts and files.

        Raises:
            DataError: If the folder has shards made with other settings, or a set with text has no null text.
        """
        self.folder, self.meta = Path(folder), replace(meta)
        null_text = meta.null_embedding()
        with refused_writes_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _IDENTITY_NAME
        if path.exists():
            found, wanted = json.loads(path.read_text()), meta.identity()
            for name in wanted:
                if found.get(name) != wanted[name]:
                    raise DataError(
                        f"{self.folder} was started with different settings: {name} was {str(found.get(name))[:16]}, "
                        f"is now {str(wanted[name])[:16]}; choose another folder or delete this one"
                    )
            self._keep_null_text(found, null_text)
        identity = {**meta.identity(), "null_text": asdict(self.meta.null_text) if self.meta.null_text else None}
        with refused_writes_named(path):
            write_atomically(path, json.dumps(identity, sort_keys=True).encode())

    def _keep_null_text(self, found: dict[str, Any], null_text: Tensor | None) -> None:
        """Use the null text of the job that started the set: another device may round it differently."""
        if null_text is None or found.get("null_text") is None:
            return
        first = NullText(**found["null_text"])
        if not same_text(first.embedding(null_text.shape[1]), null_text):
            raise DataError(
                f"{self.folder} was started with another text encoder: the embedding of the empty caption differs; "
                "choose another folder or use the original text encoder"
            )
        self.meta.null_text = first

    def _part_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.index.npz"

    def is_finished(self, shard: int) -> bool:
        """Whether a shard was completed in this or an earlier run."""
        return self._part_path(shard).exists()

    def finished_keys(self, shard: int) -> list[str]:
        """Keys of the clips in a finished shard."""
        return [key.decode("ascii") for key in self._read_part(shard)[0].keys.tolist()]

    def write_shard(self, shard: int, clips: Iterable[ClipRecord]) -> int:
        """Write one shard, completely or not at all.

        Args:
            shard: Its number. A finished shard with this number is replaced.
            clips: Its clips. May be empty: the shard is then finished and has no tar.

        Returns:
            The number of clips written.

        Raises:
            DataError: If a clip does not belong to the set, or a write fails (for example, because the disk is full).
        """
        with refused_writes_named(self.folder / shard_name(shard)):
            return self._write_shard(shard, clips)

    def _write_shard(self, shard: int, clips: Iterable[ClipRecord]) -> int:
        path, partial = self.folder / shard_name(shard), self.folder / f".{shard_name(shard)}.partial"
        (self.folder / META_NAME).unlink(missing_ok=True)
        self._part_path(shard).unlink(missing_ok=True)
        with partial.open("wb") as file:
            writer = _ShardWriter(file, shard, self.meta)
            for record in clips:
                writer.write(record)
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        part = writer.part()
        if len(part):
            partial.replace(path)
        else:
            partial.unlink()
            path.unlink(missing_ok=True)
        size = path.stat().st_size if len(part) else 0
        buffer = io.BytesIO()
        np.savez(
            buffer, clips=part.clips, frame_checksum=part.frame_checksum, keys=part.keys, size_bytes=np.int64(size)
        )
        write_atomically(self._part_path(shard), buffer.getvalue())
        return len(part)

    def _read_part(self, shard: int) -> tuple[ClipIndex, int]:
        path = self._part_path(shard)
        try:
            with np.load(path, allow_pickle=False) as part:
                return ClipIndex(part["clips"], part["frame_checksum"], part["keys"]), int(part["size_bytes"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot read {path} ({error}); delete it and encode again") from error

    def finish(self) -> ShardMeta:
        """Join the shards' parts into the set's index and write ``meta.json``.

        Returns:
            The finished description.

        Raises:
            DataError: If no shard has a clip, two clips share a key, or a write fails.
        """
        numbers = sorted(int(path.name[6:12]) for path in self.folder.glob("shard-??????.index.npz"))
        parts = [self._read_part(number) for number in numbers]
        index = ClipIndex.concatenate([part for part, _ in parts])
        if not len(index):
            raise DataError(
                f"no clips were written to {self.folder}, so there is nothing to train on; check the source"
            )
        index.check()
        with refused_writes_named(self.folder):
            index.save(self.folder)
        grids = Counter(zip(index.clips["height"].tolist(), index.clips["width"].tolist()))
        meta = replace(
            self.meta,
            clips=len(index),
            latent_frames=int(index.clips["frames"].sum()),
            tokens_per_frame=[
                {"height": h, "width": w, "tokens": h * w + 1, "clips": n} for (h, w), n in sorted(grids.items())
            ],
            shards=[
                ShardFile(name=shard_name(number), size_bytes=size, clips=len(part))
                for number, (part, size) in zip(numbers, parts)
                if len(part)
            ],
            index_sha256=index.fingerprint(),
        )
        with refused_writes_named(self.folder / META_NAME):
            write_atomically(self.folder / META_NAME, meta.to_json().encode())
        return meta
