"""What a clip and a set of shards are on disk.

A set is a folder: ``shard-000000.tar`` ... (ordinary webdataset tars), an index (``index.py``) and ``meta.json``.
In a tar each clip has up to three members, in this order, so that all but the latents is one contiguous prefix::

    KEY.json          caption, source, sizes: what a person or another pipeline wants to know
    KEY.text.bf16     text embedding [L, D], bfloat16 little-endian, without padding (absent when there is none)
    KEY.latents.bf16  normalized latents [n, C, h, w], bfloat16 little-endian

Members are raw bytes or JSON and are never decoded by type: nothing here can unpickle.

The text of a clip without a caption, and of a clip trained or sampled without its condition, is the set's *null text*:
the embedding of the empty caption. It is stored once, in ``meta.json``, so that it travels with a run's manifest.

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
"""Relative distance of two embeddings of one text; bfloat16 encoders differ by about 0.01, other weights by about 1."""
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHARD_NAME = re.compile(r"shard-[0-9]{6}\.tar|shard\.[0-9]{5}\.mds")


def check_key(key: str) -> str:
    """The key itself, or a ``DataError``: keys match ``[A-Za-z0-9_-]+`` and are never paths."""
    if len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise DataError(
            f"clip key {key[:120]!r} is not allowed: use 1 to {MAX_KEY_LENGTH} letters, digits, underscores or hyphens"
        )
    return key


def clip_id(key: str) -> int:
    """64-bit hash of a key: the clip's name in every random draw, so draws follow a clip and not its row."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def checksum(content: bytes | bytearray | memoryview) -> int:
    """The low 32 bits of XXH3, a hash that keeps up with memory: verifying costs a fraction of reading."""
    return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF


def checksums(content: memoryview, size: int) -> list[int]:
    """``checksum`` of each ``size`` bytes."""
    digest = xxhash.xxh3_64_intdigest
    return [digest(content[start : start + size]) & 0xFFFFFFFF for start in range(0, len(content), size)]


@dataclass(kw_only=True)
class ClipRecord:
    """One clip as it goes into a shard."""

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
            raise DataError(f"clip {self.key}: latents have shape {tuple(self.latents.shape)}, expected [n, C, h, w]")
        if self.text is not None and self.text.ndim != 2:
            raise DataError(f"clip {self.key}: text has shape {tuple(self.text.shape)}, expected [L, D]")
        if self.class_label is not None and self.class_label < 0:
            raise DataError(f"clip {self.key}: class_label is {self.class_label}; use None for no class")
        for name, values in (("latents", self.latents), ("text", self.text)):
            if values is not None and not bool(torch.isfinite(values.to(torch.bfloat16)).all()):
                raise DataError(f"clip {self.key}: {name} hold a number that is not finite in bfloat16")

    def metadata(self) -> dict[str, Any]:
        """The clip's JSON member."""
        skipped = {"latents", "text"}
        described = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        text_shape = None if self.text is None else list(self.text.shape)
        return {**described, "latents_shape": list(self.latents.shape), "text_shape": text_shape, "dtype": "bfloat16"}


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is what a field is declared as."""
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
            raise DataError(f"the null text is {tuple(embedding.shape)}, expected finite numbers [L, D] with L >= 1")
        content = embedding.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        return cls(bf16_base64=base64.b64encode(content).decode(), crc=zlib.crc32(content))

    def embedding(self, width: int) -> Tensor:
        """The embedding, bfloat16 [L, width].

        Raises:
            DataError: If the bytes are not those that were written.
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
    """Whether two embeddings are of one text by one encoder, up to the rounding of devices and precisions."""
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
    """``meta.json``: what made the set, and what is in it."""

    codec: str
    """Name of the codec that encoded every clip."""
    codec_fingerprint: str
    """Tells apart two codecs of one name (patch size, weights)."""
    latent_channels: int
    latent_mean: list[float] = field(default_factory=list)
    """Per channel; what the codec subtracted. Empty if it normalizes nothing."""
    latent_std: list[float] = field(default_factory=list)
    text_width: int | None = None
    """D of the text embeddings; None if clips have no text."""
    null_text: NullText | None = None
    """The embedding of the empty caption, in a set with text."""
    text_config: dict[str, Any] = field(default_factory=dict)
    """What the text encoder was built from, for encoding prompts later."""
    class_names: list[str] = field(default_factory=list)
    codec_config: dict[str, Any] = field(default_factory=dict)
    """What the codec was built from, for decoding later."""
    schema_version: int = SCHEMA_VERSION
    format: str = FORMAT
    clips: int = 0
    latent_frames: int = 0
    tokens_per_frame: list[dict[str, int]] = field(default_factory=list)
    """One ``{height, width, tokens, clips}`` for each latent grid; tokens are latent tokens and the insertion token."""
    shards: list[ShardFile] = field(default_factory=list)
    index_sha256: str = ""

    def null_embedding(self) -> Tensor | None:
        """The null text, bfloat16 [L, D]; None if clips have no text.

        Raises:
            DataError: If the set has text and no null text, or a damaged one.
        """
        if self.text_width is None:
            return None
        if self.null_text is None:
            raise DataError(
                f"the set has text of width {self.text_width} and no null text (the embedding of the empty caption); "
                "encode it again"
            )
        return self.null_text.embedding(self.text_width)

    def identity(self) -> dict[str, Any]:
        """The part that every shard of a set must share."""
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
            DataError: If it is not a description of a set, or of a schema this version cannot read.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{origin} is not JSON ({error}); encode the set again") from error
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(f"{origin} has schema_version {version}, this version reads {SCHEMA_VERSION}")
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
                    f"{origin} lists shard {name!r} {times} times; names are like shard-000000.tar, each once"
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
                f"{path} cannot be read ({error}): {folder} is not a finished shard set; "
                "make one with data_prep/encode_shards.py"
            ) from error
        return cls.from_json(text, str(path))
