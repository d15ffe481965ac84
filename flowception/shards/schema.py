"""The on-disk format of clips and shard sets.

A set is a folder of ``shard-000000.tar`` ... (ordinary webdataset tars), an index (``index.py``), and ``meta.json``.
In a tar each clip has up to three members, in this order, so that everything before the latents is one contiguous
prefix::

    KEY.json          caption, source, sizes, for people and other pipelines
    KEY.text.bf16     text embedding [L, D], bfloat16 little-endian, without padding (absent when there is none)
    KEY.latents.bf16  normalized latents [n, C, h, w], bfloat16 little-endian

Members are raw bytes or JSON and are never decoded by type: nothing here can unpickle.

Clips without a caption, and clips trained or sampled without their condition, use the set's *null text*: the embedding
of the empty caption. It is stored once, in ``meta.json``, so that it travels with a run's manifest.

Shape legend: ``n`` latent frames, ``C`` latent channels, ``h w`` latent grid, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

import torch
import xxhash
from torch import Tensor

from flowception.errors import DataError

SCHEMA_VERSION = 2
FORMAT = "webdataset-tar"
META_NAME = "meta.json"
MAX_KEY_LENGTH = 80
JSON_SUFFIX, TEXT_SUFFIX, LATENTS_SUFFIX = "json", "text.bf16", "latents.bf16"
NO_CLASS = -1
_TEXT_TOLERANCE = 0.1
"""Largest relative distance between two embeddings of the same text. Devices and precisions differ by about 0.01 in
bfloat16, other weights by about 1."""
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHARD_NAME = re.compile(r"shard-[0-9]{6}\.tar|shard\.[0-9]{5}\.mds")


def check_key(key: str) -> str:
    """Return the key, or raise ``DataError`` if it is invalid: keys match ``[A-Za-z0-9_-]+`` and are never paths."""
    if len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise DataError(
            f"clip key must be 1 to {MAX_KEY_LENGTH} letters, digits, underscores, or hyphens, got {key[:120]!r}"
        )
    return key


def clip_id(key: str) -> int:
    """64-bit hash of a key. Random draws use it to identify a clip, so they follow the clip and not its row."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def checksum(content: bytes | bytearray | memoryview) -> int:
    """The low 32 bits of XXH3, which is as fast as memory: verifying costs a fraction of reading."""
    return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF


def checksums(content: memoryview, size: int) -> list[int]:
    """``checksum`` of each block of ``size`` bytes."""
    digest = xxhash.xxh3_64_intdigest
    return [digest(content[start : start + size]) & 0xFFFFFFFF for start in range(0, len(content), size)]


@dataclass(kw_only=True)
class ClipRecord:
    """One clip to write into a shard."""

    key: str
    latents: Tensor
    """[n, C, h, w] normalized latents; stored as bfloat16."""
    text: Tensor | None = None
    """[L, D] text embedding without padding; stored as bfloat16."""
    source: str = ""
    """Where the clip came from (a file and a time, for people)."""
    caption: str = ""
    fps: float = 0.0
    pixel_height: int = 0
    pixel_width: int = 0
    pixel_frames: int = 0
    class_label: int | None = None

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.latents.ndim != 4 or 0 in self.latents.shape:
            raise DataError(
                f"clip {self.key}: latents must have shape [n, C, h, w] with sizes >= 1, got "
                f"{tuple(self.latents.shape)}"
            )
        if self.text is not None and self.text.ndim != 2:
            raise DataError(f"clip {self.key}: text must have shape [L, D], got {tuple(self.text.shape)}")
        if self.class_label is not None and self.class_label < 0:
            raise DataError(
                f"clip {self.key}: class_label must be an integer >= 0, or None for no class, got {self.class_label}"
            )
        for name, values in (("latents", self.latents), ("text", self.text)):
            if values is not None and not bool(torch.isfinite(values.to(torch.bfloat16)).all()):
                raise DataError(f"clip {self.key}: {name} must be finite in bfloat16, got NaN or infinity")

    def metadata(self) -> dict[str, Any]:
        """The clip's JSON member."""
        skipped = {"latents", "text"}
        described = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        text_shape = None if self.text is None else list(self.text.shape)
        return {**described, "latents_shape": list(self.latents.shape), "text_shape": text_shape, "dtype": "bfloat16"}


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the declared type of a field."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is UnionType:
        return any(_has_type(value, one) for one in inside)
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, inside[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(item, inside[1]) for item in value.values())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass(kw_only=True)
class NullText:
    """The embedding of the empty caption."""

    bf16_base64: str
    """[L, D] bfloat16 little-endian, in base64."""
    crc: int
    """CRC-32 of the bytes."""

    @classmethod
    def of(cls, embedding: Tensor) -> Self:
        """Pack an embedding [L, D]."""
        if embedding.ndim != 2 or 0 in embedding.shape or not bool(torch.isfinite(embedding).all()):
            raise DataError(
                "the null text must be finite numbers of shape [L, D] with L >= 1, got "
                f"{tuple(embedding.shape)}, finite: {bool(torch.isfinite(embedding).all())}"
            )
        content = embedding.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        return cls(bf16_base64=base64.b64encode(content).decode(), crc=zlib.crc32(content))

    def embedding(self, width: int) -> Tensor:
        """The embedding, bfloat16 [L, width].

        Raises:
            DataError: If the bytes differ from those that were written.
        """
        try:
            content = base64.b64decode(self.bf16_base64, validate=True)
        except binascii.Error as error:
            raise DataError(f"the set's null text is not base64 ({error}); encode the set again") from error
        if zlib.crc32(content) != self.crc or not content or len(content) % (2 * width):
            raise DataError(
                f"the set's null text ({len(content)} bytes, width {width}) does not match its checksum or width; "
                "restore meta.json or encode the set again"
            )
        return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(-1, width)


def same_text(one: Tensor, other: Tensor) -> bool:
    """Whether two embeddings are of the same text by the same encoder, up to rounding of devices and precisions."""
    if one.shape != other.shape:
        return False
    difference = (one.float() - other.float()).norm()
    return bool(difference <= _TEXT_TOLERANCE * one.float().norm())


@dataclass(kw_only=True)
class ShardFile:
    """One finished tar of a set."""

    name: str
    size_bytes: int
    clips: int


@dataclass(kw_only=True)
class ShardMeta:
    """Content of ``meta.json``: what made the set, and what is in it."""

    codec: str
    """Name of the codec that encoded every clip."""
    codec_fingerprint: str
    """Distinguishes codecs of the same name (patch size, weights)."""
    latent_channels: int
    latent_mean: list[float] = field(default_factory=list)
    """Mean per channel that the codec subtracted. Empty if it does not normalize."""
    latent_std: list[float] = field(default_factory=list)
    text_width: int | None = None
    """D of the text embeddings; None if clips have no text."""
    null_text: NullText | None = None
    """The embedding of the empty caption, in a set with text."""
    text_config: dict[str, Any] = field(default_factory=dict)
    """Configuration of the text encoder, for encoding prompts later."""
    class_names: list[str] = field(default_factory=list)
    codec_config: dict[str, Any] = field(default_factory=dict)
    """Configuration of the codec, for decoding later."""
    schema_version: int = SCHEMA_VERSION
    format: str = FORMAT
    clips: int = 0
    latent_frames: int = 0
    tokens_per_frame: list[dict[str, int]] = field(default_factory=list)
    """``{height, width, tokens, clips}`` per latent grid; ``tokens`` counts a frame's latent and insertion tokens."""
    shards: list[ShardFile] = field(default_factory=list)
    index_sha256: str = ""

    def null_embedding(self) -> Tensor | None:
        """The null text, bfloat16 [L, D]; None if clips have no text.

        Raises:
            DataError: If the set has text but no null text, or a damaged one.
        """
        if self.text_width is None:
            return None
        if self.null_text is None:
            raise DataError(
                f"the set has text of width {self.text_width} but no null text (the embedding of the empty caption); "
                "encode it again"
            )
        return self.null_text.embedding(self.text_width)

    def identity(self) -> dict[str, Any]:
        """The fields that all jobs writing a set must share."""
        names = ("schema_version", "format", "codec", "codec_fingerprint", "latent_channels", "text_width")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """The text of ``meta.json``."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str) -> Self:
        """Parse ``meta.json``.

        Args:
            text: The file's content.
            origin: The file's name, for errors.

        Returns:
            The set's description.

        Raises:
            DataError: If it does not describe a set, or has a schema version that this version cannot read.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{origin} is not JSON ({error}); encode the set again") from error
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{origin} must have schema_version {SCHEMA_VERSION}, got {version}; encode the set again with this "
                "version of Flowception"
            )
        try:
            found["shards"] = [ShardFile(**shard) for shard in found.get("shards", [])]
            found["null_text"] = NullText(**found["null_text"]) if found.get("null_text") is not None else None
            meta = cls(**found)
        except TypeError as error:
            raise DataError(f"{origin} does not describe a shard set ({error}); encode the set again") from error
        parts: list[tuple[Any, str]] = [(meta, origin), *((shard, f"{origin}, shards") for shard in meta.shards)]
        for part, where in [*parts, *([(meta.null_text, f"{origin}, null_text")] if meta.null_text else [])]:
            for name, kind in get_type_hints(type(part)).items():
                if not _has_type(getattr(part, name), kind):
                    raise DataError(
                        f"{where}: {name} is {getattr(part, name)!r}, expected {kind}; encode the set again"
                    )
        for name, times in Counter(shard.name for shard in meta.shards).items():
            if not _SHARD_NAME.fullmatch(name) or times > 1:
                raise DataError(
                    f"{origin} lists shard {name!r} {times} times; each shard must be listed once, with a name like "
                    "shard-000000.tar"
                )
        return meta

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the ``meta.json`` of a set."""
        path = folder / META_NAME
        try:
            text = path.read_text()
        except (OSError, UnicodeError) as error:
            raise DataError(
                f"cannot read {path} ({error}): {folder} is not a finished shard set; "
                "create one with data_prep/encode_shards.py"
            ) from error
        return cls.from_json(text, str(path))
