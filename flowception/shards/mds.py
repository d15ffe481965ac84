"""Sets in the MDS format, written and read with mosaicml-streaming, for the same plan as sets of tars.

An MDS set is a folder with ``index.json`` and ``shard.00000.mds`` ... from ``streaming.MDSWriter``, plus our index and
``meta.json``. A sample has four columns of bytes: ``key``, ``json``, ``text``, and ``latents`` (text and latents in
bfloat16, as in ``schema.py``). The library reads complete samples, so a pack reads all frames of a clip, not only the
visible ones. The frames used are verified against our index, because the library does not verify local shards.

``data_prep/convert_shards.py`` makes such a set. Install the library with ``make setup-mds``: its declared dependencies
conflict with diffusers, and it imports vision packages that nothing here needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flowception.errors import DataError, MissingDependencyError
from flowception.files import write_atomically
from flowception.shards.index import CLIP_DTYPE, ClipIndex
from flowception.shards.reader import FolderReader, ShardReader, frames_refused
from flowception.shards.schema import META_NAME, ShardFile, ShardMeta, checksum
from flowception.shards.writer import bf16_bytes

MDS_FORMAT = "mds"
COLUMNS = {"key": "bytes", "json": "bytes", "text": "bytes", "latents": "bytes"}
_UNUSED = ("streaming.vision", "streaming.text", "streaming.multimodal")


def import_streaming() -> ModuleType:
    """Import mosaicml-streaming without its vision, text, and multimodal parts, which need torchvision.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    if "streaming" in sys.modules:
        return sys.modules["streaming"]
    stubbed = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update({name: ModuleType(name) for name in stubbed})
    try:
        import streaming
    except ImportError as error:
        raise MissingDependencyError(
            f"cannot import mosaicml-streaming, which MDS sets need ({error}); install it with make setup-mds"
        ) from error
    finally:
        for name in stubbed:
            sys.modules.pop(name, None)
    return streaming


def _described_checksum(key: bytes, described: bytes, text: bytes) -> int:
    return checksum(key + described + text)


def write_mds(source: ShardReader, folder: Path, shard_bytes: int) -> ShardMeta:
    """Write the clips of a set as an MDS set with the same order and rows.

    Args:
        source: The set.
        folder: An empty folder.
        shard_bytes: Largest size of a shard.

    Returns:
        The new set's description.
    """
    index = source.index
    clips = np.array(index.clips, dtype=CLIP_DTYPE)
    with import_streaming().MDSWriter(out=str(folder), columns=COLUMNS, size_limit=shard_bytes) as writer:
        for row in range(len(index)):
            text = source.read_text(row)
            latents = source.read(row, np.arange(int(clips["frames"][row])))
            sample = {
                "key": index.key(row).encode(),
                "json": json.dumps(source.read_metadata(row), sort_keys=True).encode(),
                "text": b"" if text is None else bf16_bytes(text),
                "latents": bf16_bytes(latents),
            }
            writer.write(sample)
            clips["prefix_checksum"][row] = _described_checksum(sample["key"], sample["json"], sample["text"])
            clips["json_bytes"][row] = len(sample["json"])
    shards = json.loads((folder / "index.json").read_text())["shards"]
    clips["shard"] = np.repeat(np.arange(len(shards)), [shard["samples"] for shard in shards])
    clips["start"], clips["latents_offset"] = 0, 0
    written = ClipIndex(clips, np.array(index.frame_checksum), np.array(index.keys))
    written.save(folder)
    files = [
        ShardFile(name=s["raw_data"]["basename"], size_bytes=s["raw_data"]["bytes"], clips=s["samples"]) for s in shards
    ]
    meta = ShardMeta.from_json(source.meta.to_json(), "the set")
    meta.format, meta.shards, meta.index_sha256 = MDS_FORMAT, files, written.fingerprint()
    write_atomically(folder / META_NAME, meta.to_json().encode())
    return meta


class MdsReader(FolderReader):
    """Reads clips of an MDS set; what ``ShardReader`` is for tars."""

    format = MDS_FORMAT

    def __init__(self, folder: Path | str, *, codec: str | None = None, codec_fingerprint: str | None = None) -> None:
        """Open a set; see ``FolderReader``.

        Raises:
            MissingDependencyError: If mosaicml-streaming is not installed.
        """
        super().__init__(folder, codec=codec, codec_fingerprint=codec_fingerprint)
        try:
            self._samples = import_streaming().LocalDataset(str(self.folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot read {self.folder}/index.json ({error}); convert the set again") from error
        found = [(s.raw_data.basename, s.raw_data.bytes, s.samples) for s in self._samples.shards]
        if found != [(s.name, s.size_bytes, s.clips) for s in self.meta.shards]:
            raise DataError(f"{self.folder}/index.json and meta.json list different shards; convert the set again")
        self._last: tuple[int, dict[str, bytes]] | None = None

    def describe(self, row: int) -> str:
        """A clip and its file, for messages."""
        shard = self.meta.shards[int(self.index.clips["shard"][row])]
        return f"clip {self.index.key(row)} in {self.folder / shard.name}"

    def _sample(self, row: int) -> dict[str, bytes]:
        """A clip's columns. The last clip is cached, because its text and its latents are read separately."""
        if self._last is not None and self._last[0] == row:
            return self._last[1]
        if not 0 <= row < len(self.index):
            raise DataError(f"row {row} is not in the index of {self.folder}, which has {len(self.index)} clips")
        try:
            sample: dict[str, bytes] = self._samples.get_item(row)
        except (OSError, IndexError, ValueError) as error:
            raise DataError(f"cannot read {self.describe(row)} ({error})") from error
        if set(sample) != set(COLUMNS):
            raise DataError(
                f"{self.describe(row)} must have columns {sorted(COLUMNS)}, got {sorted(sample)}; convert the set again"
            )
        if (
            _described_checksum(sample["key"], sample["json"], sample["text"])
            != self.index.clips["prefix_checksum"][row]
        ):
            raise DataError(f"{self.describe(row)}: key, metadata or text do not match their checksum")
        self._last = (row, sample)
        return sample

    def read_clip(self, row: int, frames: ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Some latent frames of a clip and its text; see ``ShardReader.read_clip``."""
        return self.read(row, frames), self.read_text(row)

    def read(self, row: int, frames: ArrayLike) -> Tensor:
        """Some latent frames of a clip without its text, bfloat16 [k, C, h, w]."""
        content = self._sample(row)["latents"]
        clip = self.index.clips[row]
        wanted = np.asarray(frames, dtype=np.int64)
        if refused := frames_refused(wanted, int(clip["frames"])):
            raise DataError(f"{self.describe(row)}: {refused}")
        shape = (self.latent_channels, int(clip["height"]), int(clip["width"]))
        frame_bytes = 2 * int(np.prod(shape))
        if len(content) != int(clip["frames"]) * frame_bytes:
            raise DataError(
                f"{self.describe(row)} must have {int(clip['frames']) * frame_bytes} bytes of latents according to the "
                f"index, got {len(content)}; convert the set again"
            )
        out = bytearray()
        for frame in wanted.tolist():
            part = content[frame * frame_bytes : (frame + 1) * frame_bytes]
            if checksum(part) != self.index.frame_checksum[int(clip["checksum_start"]) + frame]:
                raise DataError(f"{self.describe(row)}: latent frame {frame} does not match its checksum")
            out += part
        if not out:
            return torch.zeros(0, *shape, dtype=torch.bfloat16)
        return torch.frombuffer(out, dtype=torch.bfloat16).view(-1, *shape)

    def read_text(self, row: int) -> Tensor | None:
        """The text embedding of a clip, bfloat16 [L, D]; None if it has none."""
        text = self._sample(row)["text"]
        tokens, width = int(self.index.clips["text_tokens"][row]), self.meta.text_width
        if tokens == 0 or width is None:
            return None
        if len(text) != 2 * tokens * width:
            raise DataError(
                f"{self.describe(row)} must have {2 * tokens * width} bytes of text according to the index, got "
                f"{len(text)}; convert the set again"
            )
        return torch.frombuffer(bytearray(text), dtype=torch.bfloat16).view(tokens, width)

    def read_metadata(self, row: int) -> dict[str, Any]:
        """The clip's JSON: caption, source, sizes."""
        described: dict[str, Any] = json.loads(self._sample(row)["json"])
        return described

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}
