"""Encoding a manifest of videos into a shard set, continuing where an earlier run stopped.

Shard k holds the clips of entries ``k V .. (k + 1) V - 1`` of the manifest, with V = ``videos_per_shard``. A shard is
written completely or not at all. Files next to it list the entries without a clip, with the reason, and count the
dropped pieces of the others. So a job that was killed and restarted ends with the same bytes as an uninterrupted one.
A job locks a shard while writing it, so two jobs never write the same shard, whatever their part numbers.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data_prep.encoder.clip_cutter import CutClip, CutSettings, CutVideo
from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.decode_pool import Decoded, decode_videos
from data_prep.encoder.manifest import VideoEntry, VideoManifest, read_source
from data_prep.encoder.skipped import (
    DROPPED_NAME,
    UNREADABLE_NAME,
    DroppedPieces,
    read_dropped,
    read_unreadable,
    write_skipped,
)
from data_prep.encoder.video_headers import HeaderReader
from flowception.codecs.base import Codec
from flowception.codecs.build import build_codec
from flowception.codecs.text import TextEncoder
from flowception.codecs.video_file import Frame
from flowception.errors import ConfigError, DataError
from flowception.files import FileLock, write_atomically
from flowception.progress import Progress
from flowception.shards.schema import ClipRecord, NullText, ShardMeta
from flowception.shards.writer import ShardSetWriter, refused_writes_named

logger = logging.getLogger(__name__)
SETTINGS_NAME = "encode_settings.json"
MANIFEST_REPORT_NAME, MISSING_NAME = "manifest_report.json", "missing.txt"
_SET_LOCK = ".set.lock"
_FREE_TO_CHANGE = ("source", "out", "num_workers", "decode_timeout_s", "device", "part", "num_parts")
"""Settings that do not change the clips of the set."""


class ShardInUse(ConfigError):
    """Another job is writing the shard."""


def shard_lock(folder: Path, shard: int) -> Path:
    """The file whose lock is held while a shard is written."""
    return folder / f".shard-{shard:06d}.lock"


@dataclass(frozen=True)
class EncodeSummary:
    """Counts over all finished shards of a set."""

    videos: int
    """Videos with at least one clip."""
    unreadable: int
    """Videos without a clip."""
    clips: int
    """Clips of the set so far."""
    dropped: DroppedPieces
    """Dropped pieces of the videos with clips."""
    open_shards: int
    """Shards that other parts still have to encode; 0 if the set is finished."""


class ShardEncoder:
    """One encoding job: a manifest, a codec, and the set to write."""

    def __init__(self, config: EncodeConfig) -> None:
        """Read the manifest, load the codec and check that the folder belongs to this job."""
        self.config = config
        self.folder = Path(config.out)
        self.manifest: VideoManifest = read_source(
            config.source,
            config.source_format,
            config.split,
            config.filters,
            config.frame_folder_fps,
            HeaderReader(self.folder),
        )
        logger.info("%s", "\n".join(self.manifest.report.lines()))
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.codec: Codec = build_codec(config.codec, device)
        config.check_codec(self.codec)
        self.text = None if config.text.model is None else TextEncoder.from_config(config.text, device)
        self.cut = CutSettings(
            fps=config.fps,
            height=config.height,
            width=config.width,
            size_multiple=self.codec.spatial_stride,
            min_frames=config.min_frames,
            max_frames=config.max_frames,
            max_pixels=config.max_pixels,
            min_motion=config.min_motion,
            max_video_bytes=config.max_video_gib * 2**30,
        )
        self.num_shards = -(-len(self.manifest.entries) // config.videos_per_shard)
        set_lock = FileLock(self.folder / _SET_LOCK, ConfigError, wait=True)  # parts may start at the same time
        with set_lock, refused_writes_named(self.folder):
            _check_settings(self.folder / SETTINGS_NAME, config, self.manifest)
            write_atomically(self.folder / MANIFEST_REPORT_NAME, self.manifest.report.to_json())
            missing = "".join(f"{name}\n" for name in self.manifest.report.missing)
            write_atomically(self.folder / MISSING_NAME, missing)
            self.writer = ShardSetWriter(self.folder, self._meta())
        self.null_text = self.writer.meta.null_embedding()

    def _meta(self) -> ShardMeta:
        return ShardMeta(
            codec=self.codec.name,
            codec_fingerprint=self.codec.fingerprint(),
            latent_channels=self.codec.latent_channels,
            latent_mean=list(self.codec.latent_mean),
            latent_std=list(self.codec.latent_std),
            text_width=None if self.text is None else self.text.text_dim,
            null_text=None if self.text is None else NullText.of(self.text.encode([""])[0]),
            text_config={} if self.text is None else asdict(self.config.text),
            class_names=list(self.manifest.class_names),
            codec_config=asdict(self.config.codec),
        )

    def run(self) -> EncodeSummary:
        """Encode every unfinished shard of this part, then finish the set if all shards are done.

        Returns:
            Counts over all finished shards.

        Raises:
            ConfigError: If another job is encoding this part.
            DataError: If no video of the set could be read.
        """
        advice = f"it is encoding part {self.config.part} too: wait for it, stop it, or choose another out"
        with FileLock(self.folder / f".part-{self.config.part}.lock", ConfigError, advice):
            self._encode_shards()
            with FileLock(self.folder / _SET_LOCK, ConfigError, wait=True):  # parts may end at the same time
                return self._finish()

    def _encode_shards(self) -> None:
        mine = [k for k in range(self.num_shards) if k % self.config.num_parts == self.config.part]
        todo = [k for k in mine if not self.writer.is_finished(k)]
        if len(todo) < len(mine):
            logger.info("%d of %d shards are already finished", len(mine) - len(todo), len(mine))
        videos = [
            (
                entry.path,
                replace(self.cut, start_s=entry.start_s, end_s=entry.end_s, frame_folder_fps=entry.frame_folder_fps),
            )
            for k in todo
            for entry in self._entries(k)
        ]
        with (
            Progress(len(videos), "encoding videos") as progress,
            closing(decode_videos(videos, self.config.num_workers, timeout_s=self.config.decode_timeout_s)) as decoded,
        ):
            for shard in todo:
                self._encode_shard(shard, decoded, progress.advance)

    def _encode_shard(self, shard: int, decoded: Iterator[Decoded], advance: Callable[[], None]) -> None:
        """Write a shard, or skip its videos if another job has written or is writing it."""
        try:
            lock = FileLock(shard_lock(self.folder, shard), ShardInUse)
        except ShardInUse:
            lock = None
        try:
            if lock is None or self.writer.is_finished(shard):
                for _ in islice(decoded, len(self._entries(shard))):
                    advance()
            else:
                self.writer.write_shard(shard, self._records(shard, decoded, advance))
        finally:
            if lock is not None:
                lock.release()

    def _entries(self, shard: int) -> tuple[VideoEntry, ...]:
        size = self.config.videos_per_shard
        return self.manifest.entries[shard * size : (shard + 1) * size]

    def _records(self, shard: int, decoded: Iterator[Decoded], advance: Callable[[], None]) -> Iterator[ClipRecord]:
        """The clips of a shard, from the next videos of ``decoded``.

        The skipped entries and the counts of dropped pieces are on disk once the last clip is consumed, so before the
        shard counts as finished.
        """
        entries, skipped, dropped = self._entries(shard), list[str](), Counter[str]()
        waiting, waiting_clips = list[tuple[VideoEntry, Decoded]](), 0
        for entry, found in zip(entries, islice(decoded, len(entries)), strict=True):
            waiting.append((entry, found))
            waiting_clips += 0 if isinstance(found, str) else len(found.clips)
            if max(waiting_clips, len(waiting)) >= self.config.clips_per_batch:
                yield from self._encode(waiting, skipped, dropped)
                waiting, waiting_clips = [], 0
            advance()
        yield from self._encode(waiting, skipped, dropped)
        write_skipped(self.folder, shard, "".join(skipped), dropped)

    def _encode(
        self, videos: list[tuple[VideoEntry, Decoded]], skipped: list[str], dropped: Counter[str]
    ) -> Iterator[ClipRecord]:
        """The clips of some videos, in order. A video yields all its clips or adds its reason to ``skipped``."""
        cut = [self._usable_part(found) for _, found in videos]
        latents = self._encode_in_groups([clip.frames for usable in cut if usable for clip in usable.clips])
        texts = self._encode_captions([entry.caption for entry, _ in videos])
        for (entry, found), usable, text in zip(videos, cut, texts, strict=True):
            encoded = list(islice(latents, len(usable.clips) if usable else 0))
            try:
                if usable is None:
                    raise DataError(self._reason(entry, found))
                yield from [
                    self._record(entry, number, clip, latent, text)
                    for number, (clip, latent) in enumerate(zip(usable.clips, encoded, strict=True))
                ]
                dropped.update(usable.dropped)
            except DataError as error:
                reason = str(error).replace(str(entry.path), entry.source)
                skipped.append(json.dumps({"source": entry.source, "key": entry.key, "reason": reason}) + "\n")

    def _encode_in_groups(self, clips: list[Frame]) -> Iterator[torch.Tensor]:
        """Latents of each clip, ``clips_per_batch`` at a time, which bounds the memory for long videos."""
        size = self.config.clips_per_batch
        for first in range(0, len(clips), size):
            yield from self.codec.encode_many(clips[first : first + size])

    def _usable_part(self, found: Decoded) -> CutVideo | None:
        """Clips trimmed to lengths that the codec accepts; None if none remain."""
        if isinstance(found, str):
            return None
        usable = self.codec.usable_frames
        trimmed = [replace(clip, frames=clip.frames[: usable(len(clip.frames))]) for clip in found.clips]
        clips = [clip for clip in trimmed if len(clip.frames) >= max(1, self.config.min_frames)]
        too_short = Counter(min_frames=len(trimmed) - len(clips))
        return CutVideo(clips, found.dropped + too_short) if clips else None

    def _reason(self, entry: VideoEntry, found: Decoded) -> str:
        """Why a video has no clip."""
        if isinstance(found, str):
            return found
        frames = len(found.clips[0].frames)
        return (
            f"{entry.path} has {frames} frames, the {self.codec.name} codec can use "
            f"{self.codec.usable_frames(frames)} of them, and min_frames is {self.config.min_frames}"
        )

    def _encode_captions(self, captions: list[str]) -> list[torch.Tensor | None]:
        """Embedding of each caption; the set's null text for an empty one."""
        if self.text is None:
            return [None] * len(captions)
        embedded = iter(self.text.encode([caption for caption in captions if caption.strip()]))
        return [next(embedded) if caption.strip() else self.null_text for caption in captions]

    def _record(
        self, entry: VideoEntry, number: int, clip: CutClip, latents: torch.Tensor, text: torch.Tensor | None
    ) -> ClipRecord:
        return ClipRecord(
            key=f"{entry.key}-{number:04d}",
            latents=latents,
            text=text,
            source=f"{entry.source}@{clip.start_s:.3f}s",
            caption=entry.caption,
            fps=clip.fps,
            pixel_height=clip.frames.shape[1],
            pixel_width=clip.frames.shape[2],
            pixel_frames=len(clip.frames),
            class_label=entry.class_label,
        )

    def _finish(self) -> EncodeSummary:
        finished = [k for k in range(self.num_shards) if self.writer.is_finished(k)]
        skipped, dropped = read_unreadable(self.folder, finished), read_dropped(self.folder, finished)
        unreadable = skipped.count("\n")
        clips = sum(len(self.writer.finished_keys(k)) for k in finished)
        if len(finished) == self.num_shards:
            with refused_writes_named(self.folder):
                write_atomically(self.folder / UNREADABLE_NAME, skipped)
                write_atomically(self.folder / DROPPED_NAME, dropped.to_json())
            if clips == 0:
                raise DataError(
                    f"none of the {unreadable} videos in {self.config.source} could be read; "
                    f"see the reasons in {self.folder / UNREADABLE_NAME}"
                )
            self.writer.finish()
            for shard in finished:
                shard_lock(self.folder, shard).unlink(missing_ok=True)
        videos = sum(len(self._entries(k)) for k in finished) - unreadable
        return EncodeSummary(videos, unreadable, clips, dropped, self.num_shards - len(finished))


def _check_settings(path: Path, config: EncodeConfig, manifest: VideoManifest) -> None:
    """Record the settings of a new set, or raise ``ConfigError`` if the set was started with different ones."""
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE_TO_CHANGE}
    settings |= {"manifest_sha256": manifest.sha256(), "videos": len(manifest.entries)}
    if not path.exists():
        write_atomically(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return
    try:
        first, now = _flat(json.loads(path.read_text())), _flat(settings)
        videos = first.pop("videos"), now.pop("videos")
        same_list = first.pop("manifest_sha256") == now.pop("manifest_sha256")
    except (KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or of another version ({error!r}); choose another out") from error
    changes = [
        f"{name} was {first.get(name)}, is now {value}" for name, value in now.items() if first.get(name) != value
    ]
    if not same_list:
        changes.append(f"the list of videos changed: it had {videos[0]} video{'s' * (videos[0] != 1)}, now {videos[1]}")
    if changes:
        raise ConfigError(
            f"{path.parent} was started with different settings: {', '.join(changes)}; choose another out"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The same settings with dotted keys instead of nesting."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
