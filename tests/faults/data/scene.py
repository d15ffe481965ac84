"""A small set to damage, and the checks that follow: see ``faults.py``."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from flowception.data.loader import PackLoader
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor
from flowception.errors import DataError, FlowceptionError
from flowception.packing.flops import ModelSpec
from flowception.shards import remote_cache as remote_module
from flowception.shards.index import CLIP_DTYPE, ClipIndex
from flowception.shards.open import open_set
from flowception.shards.reader import ShardReader
from flowception.shards.remote_cache import CacheConfig
from flowception.shards.schema import NullText, ShardMeta, checksum, checksums
from flowception.shards.writer import ShardSetWriter
from tests.faults.data.http_server import serve
from tests.small_sets import CHANNELS, NULL_TEXT_TOKENS, TEXT_WIDTH, configs, record

SPEC = ModelSpec(
    hidden_size=32, num_layers=2, num_heads=2, in_channels=CHANNELS, mlp_hidden_size=88, num_classes=3,
    text_dim=TEXT_WIDTH,
)  # fmt: skip
META = ShardMeta(
    codec="patchify",
    codec_fingerprint="abc",
    latent_channels=CHANNELS,
    text_width=TEXT_WIDTH,
    null_text=NullText.of(torch.full((NULL_TEXT_TOKENS, TEXT_WIDTH), 0.25)),
    class_names=["a", "b", "c"],
)
VICTIM = 13
"""A clip of shard 1 with 6 frames and text."""


@dataclass
class Scene:
    """A set of 30 clips in 3 shards, in its own folder."""

    scratch: Path

    def __post_init__(self) -> None:
        self.folder = self.scratch / "set"
        self.records = [
            record(i, frames=3 + i % 4 if i != VICTIM else 6, height=2 + i % 2, text=1 + i % 3) for i in range(30)
        ]
        writer = ShardSetWriter(self.folder, META)
        for shard in range(3):
            writer.write_shard(shard, self.records[10 * shard : 10 * shard + 10])
        writer.finish()
        self.index = ClipIndex.load(self.folder)

    @property
    def shard(self) -> Path:
        """The victim's shard file."""
        return self.folder / "shard-000001.tar"

    def damage(self, offset: int, content: bytes, path: Path | None = None) -> None:
        with (path or self.shard).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def sign(self, clips=None, keys=None, frames=None) -> None:
        """Write another index with a matching hash, so that only its content shows the damage."""
        old = self.index
        index = ClipIndex(
            old.clips if clips is None else clips,
            np.array(old.frame_checksum) if frames is None else frames,
            old.keys if keys is None else keys,
        )
        index.save(self.folder)
        meta = ShardMeta.load(self.folder)
        meta.index_sha256 = index.fingerprint()
        (self.folder / "meta.json").write_text(meta.to_json())

    def changed(self, **fields) -> np.ndarray:
        clips = np.array(self.index.clips, dtype=CLIP_DTYPE)
        for name, value in fields.items():
            clips[name][VICTIM] = value
        return clips

    def overwrite_frame(self, value: float) -> None:
        """Put a value into the victim's frame 2 and update its checksum, as a broken encoder would."""
        latents = self.records[VICTIM].latents.clone()
        latents[2, 0, 0, 0] = value
        content = latents.contiguous().view(torch.uint8).numpy().tobytes()
        self.damage(int(self.index.clips["latents_offset"][VICTIM]), content)
        frames = np.array(self.index.frame_checksum)
        start = int(self.index.clips["checksum_start"][VICTIM])
        frames[start : start + 6] = checksums(memoryview(content), len(content) // 6)
        self.sign(frames=frames)

    def overwrite_text(self, value: float) -> None:
        """Put a value at the end of the victim's text and update its checksum."""
        row = self.index.clips[VICTIM]
        start, end = int(row["start"]), int(row["latents_offset"])
        prefix = bytearray(self.shard.read_bytes()[start:end])
        prefix[-1024:-1022] = torch.tensor([value]).bfloat16().view(torch.uint8).numpy().tobytes()
        self.damage(start, bytes(prefix))
        self.sign(clips=self.changed(prefix_checksum=checksum(prefix)))


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    stage: str
    inject: Callable
    says: str
    """Regular expression that the error must match."""
    victims: tuple[int, ...] = ()
    """Rows of the clips that become padding (stages run, signed, and remote)."""


class _IntactReader(ShardReader):
    """Reads an undamaged set, without some of its clips."""

    without: tuple[int, ...] = ()

    def read_clip(self, row: int, frames: ArrayLike) -> tuple[torch.Tensor, torch.Tensor | None]:
        if row in self.without:
            raise DataError("skipped")
        return super().read_clip(row, frames)


def _outcome_of_reading(scene: Scene, open_reader: Callable, entry: Fault) -> str:
    """Run an epoch with the fault, compare it with an undamaged one, resume it, and plan the next epoch."""
    config = configs(token_budget=120, packs_per_step=2, shuffle_block_shards=3)
    with tempfile.TemporaryDirectory() as clean:
        intact = Scene(Path(clean))
        reader = open_reader()
        plan = Plan(reader.index, None, *config, SPEC, 1, null_text_tokens=NULL_TEXT_TOKENS)
        # The same plan, read from the intact set: everything undamaged must be equal.
        undamaged = _IntactReader(intact.folder)
        undamaged.without = entry.victims
        expected = list(PackLoader(plan, undamaged))
        found = list(PackLoader(plan, reader))
    bad = {clip.key: clip.reason for batch in found for clip in batch.quarantined}
    assert set(bad) == {scene.index.key(row) for row in entry.victims}, sorted(bad)
    for reason in bad.values():
        assert re.search(entry.says, reason), reason
        assert "shard-000001.tar" in reason or "contains NaN or infinity" in reason, reason
    for ours, theirs in zip(found, expected, strict=True):
        for pack, intact_pack in zip(ours.packs, theirs.packs, strict=True):
            damaged = torch.tensor([key in bad for key in pack.keys] + [False] * len(pack.class_label))
            silent = damaged[pack.layout.token_clip.clamp(min=0)] & (pack.layout.token_clip >= 0)
            assert torch.isfinite(pack.noisy).all()
            assert torch.equal(pack.noisy[~silent], intact_pack.noisy[~silent])
            assert not pack.noisy[silent].any()
            assert not pack.weight_token[silent].any()
            assert not pack.velocity_mask[silent].any()
    resumed = list(
        PackLoader(
            Plan(reader.index, None, *config, SPEC, 1, null_text_tokens=NULL_TEXT_TOKENS),
            open_reader(),
            cursor=found[0].next_cursor,
        )
    )
    for first, second in zip(found[1:], resumed, strict=True):
        assert [(clip.key, clip.tokens) for clip in first.quarantined] == [
            (c.key, c.tokens) for c in second.quarantined
        ]
        assert all(torch.equal(p.noisy, q.noisy) for p, q in zip(first.packs, second.packs))
    after = plan.with_quarantine(bad)
    for batch in PackLoader(after, reader, cursor=Cursor(1, 0)):
        assert not batch.quarantined
    reason = next(iter(bad.values()))
    return f"{len(bad)} clips became padding, the run continued, the next epoch skips them: {reason}"


def happens(entry: Fault, scratch: Path) -> str:
    """Inject a fault, check its consequences, and describe them."""
    scene = Scene(scratch)
    if entry.stage == "remote":
        with serve(scene.folder) as server:
            remote_module.FIRST_PAUSE_S = 0.01
            timeout_s = 2.0 if "stall" in entry.name else 30.0
            config = CacheConfig(cache_dir=str(scratch / "cache"), timeout_s=timeout_s, attempts=2)
            entry.inject(server)
            return _outcome_of_reading(scene, lambda: open_set(server.url, config), entry)
    if entry.stage == "signed":
        entry.inject(scene)
        return _outcome_of_reading(scene, lambda: ShardReader(scene.folder), entry)
    if entry.stage == "run":
        reader = ShardReader(scene.folder)
        restore = entry.inject(scene)
        try:
            return _outcome_of_reading(scene, lambda: reader, entry)
        finally:
            if callable(restore):
                restore()
    try:
        entry.inject(scene)
        ShardReader(scene.folder)
    except FlowceptionError as error:
        text = " ".join(str(error).split())
        assert re.search(entry.says, text), text
        assert not (scratch / "new" / "meta.json").exists()
        assert not (scratch / "new" / "shard-000000.tar").exists() or "the same id" in text
        return f"refused: {text}"
    raise AssertionError(f"{entry.name} went unnoticed")
