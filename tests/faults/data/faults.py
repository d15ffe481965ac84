"""Data faults and the result of each: ``python tests/faults/data/faults.py`` prints ``docs/data_faults.md``.

Stages:

- *open*: the set is damaged before it is opened, and opening it fails with an error that names the problem.
- *run*, *signed*, *remote*: a clip's bytes are damaged during a run, were written wrong with valid checksums, or do not
  arrive over the network. Exactly the damaged clips become padding and are listed with shard and reason. Every other
  number equals that of an undamaged run, a resumed run does the same, and the next epoch skips the clips.
- *encode*: an encoder hits the fault and writes nothing wrong.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np

from flowception.data.pack import check_widths
from flowception.shards import reader as reader_module
from flowception.shards.index import ClipIndex
from flowception.shards.reader import ShardReader
from flowception.shards.schema import ClipRecord, clip_id
from flowception.shards.writer import ShardSetWriter
from tests.faults.data.scene import META, SPEC, VICTIM, Fault, Scene, happens

FAULTS: list[Fault] = []
SHARD_1 = tuple(range(10, 20))


def fault(name: str, stage: str, says: str, victims: tuple[int, ...] = ()):
    """Add a function to the table."""

    def add(inject: Callable) -> Callable:
        FAULTS.append(Fault(name, stage, inject, says, victims))
        return inject

    return add


def simple(name: str, stage: str, says: str, inject: Callable, victims: tuple[int, ...] = ()) -> None:
    FAULTS.append(Fault(name, stage, inject, says, victims))


def _edit_meta(scene: Scene, old: str, new: str) -> None:
    path = scene.folder / "meta.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


simple("shard missing", "open", r"shard .*shard-000001.tar is missing", lambda s: s.shard.unlink())
simple("shard truncated", "open", r"shard-000001.tar has \d+ bytes, expected \d+", lambda s: os.truncate(s.shard, 5000))
simple("shard grown", "open", r"shard-000001.tar has \d+ bytes", lambda s: s.shard.open("ab").write(bytes(512)))
simple("no meta.json", "open", r"cannot read .*meta.json \(", lambda s: (s.folder / "meta.json").unlink())
simple("meta.json truncated", "open", r"meta.json is not JSON", lambda s: os.truncate(s.folder / "meta.json", 200))
simple(
    "meta.json with another schema version",
    "open",
    "schema_version 2, got 9",
    lambda s: _edit_meta(s, '"schema_version": 2', '"schema_version": 9'),
)
simple(
    "meta.json without a field",
    "open",
    "does not describe a shard set",
    lambda s: _edit_meta(s, '"codec": "patchify",', ""),
)
simple(
    "meta.json lists a shard twice",
    "open",
    "lists shard 'shard-000000.tar' 2 times",
    lambda s: _edit_meta(s, "shard-000001.tar", "shard-000000.tar"),
)
simple("no index", "open", r"cannot read .*index-clips.npy \(", lambda s: (s.folder / "index-clips.npy").unlink())
simple(
    "index truncated",
    "open",
    r"cannot read .*index-clips.npy \(",
    lambda s: os.truncate(s.folder / "index-clips.npy", 700),
)
simple(
    "bit flip in the index",
    "open",
    "does not match meta.json",
    lambda s: s.damage(600, b"\x55", s.folder / "index-clips.npy"),
)
simple(
    "clip with zero frames in the index", "open", "a clip without frames", lambda s: s.sign(clips=s.changed(frames=0))
)
simple("offset outside the shard", "open", "outside its shard", lambda s: s.sign(clips=s.changed(latents_offset=2**40)))
simple("shard missing from meta.json", "open", "does not list", lambda s: s.sign(clips=s.changed(shard=77)))
simple("clip listed twice", "open", "have the same id", lambda s: s.sign(clips=s.changed(clip_id=clip_id("clip_000"))))
simple(
    "metadata longer than the clip", "open", "outside its shard", lambda s: s.sign(clips=s.changed(json_bytes=2**31))
)


@fault("key that is a path", "open", "clip key must be")
def _(scene: Scene) -> None:
    keys = np.array(scene.index.keys)
    keys[VICTIM] = b"../up"
    scene.sign(keys=keys)


@fault("index from an older version of the set", "open", "does not match meta.json")
def _(scene: Scene) -> None:
    ClipIndex(scene.changed(frames=5), np.array(scene.index.frame_checksum), scene.index.keys).save(scene.folder)


@fault("pickle in place of the keys", "open", r"cannot read .*index-keys.npy \(")
def _(scene: Scene) -> None:
    np.save(scene.folder / "index-keys.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


@fault("set from another codec", "open", "encoded with codec 'patchify'.*this run uses 'ltx'")
def _(scene: Scene) -> None:
    ShardReader(scene.folder, codec="ltx")


@fault("channel count differs from the model", "open", "4 latent channels, but model.in_channels is 8")
def _(scene: Scene) -> None:
    check_widths(replace(SPEC, in_channels=8), ShardReader(scene.folder))


@fault("text width differs from the model", "open", "text of width 6, but model.text_dim is 8")
def _(scene: Scene) -> None:
    check_widths(replace(SPEC, text_dim=8), ShardReader(scene.folder))


def _flip(scene: Scene, offset: int) -> None:
    scene.damage(offset, bytes([scene.shard.read_bytes()[offset] ^ 1]))


def _latents(scene: Scene) -> int:
    return int(scene.index.clips["latents_offset"][VICTIM])


simple(
    "bit flip in a latent",
    "run",
    "latent frame 0 does not match its checksum",
    lambda s: _flip(s, _latents(s) + 3),
    (VICTIM,),
)
simple(
    "bit flip in the text",
    "run",
    "headers, metadata or text do not match",
    lambda s: _flip(s, _latents(s) - 1024),
    (VICTIM,),
)
simple(
    "bit flip in the caption",
    "run",
    "headers, metadata or text do not match",
    lambda s: _flip(s, int(s.index.clips["start"][VICTIM]) + 530),
    (VICTIM,),
)
simple(
    "header inside the file overwritten with garbage",
    "run",
    "headers, metadata or text do not match",
    lambda s: s.damage(int(s.index.clips["start"][VICTIM]), np.random.default_rng(0).bytes(512)),
    (VICTIM,),
)
simple("block of zeros in a shard", "run", "do(es)? not match", lambda s: s.damage(_latents(s), bytes(64)), (VICTIM,))
simple(
    "shard truncated during a run",
    "run",
    "shard-000001.tar: the shard is truncated at byte",
    lambda s: os.truncate(s.shard, 0),
    SHARD_1,
)
simple("shard deleted during a run", "run", r"cannot read .*shard-000001.tar \(", lambda s: s.shard.unlink(), SHARD_1)
simple(
    "shard replaced by random bytes of the same size",
    "run",
    "do(es)? not match",
    lambda s: s.shard.write_bytes(np.random.default_rng(1).bytes(s.shard.stat().st_size)),
    SHARD_1,
)
simple(
    "shard overwritten with another shard",
    "run",
    "do(es)? not match|the shard is truncated",
    lambda s: s.shard.write_bytes((s.folder / "shard-000000.tar").read_bytes()),
    SHARD_1,
)
simple(
    "NaN latent with a valid checksum",
    "signed",
    "contains NaN or infinity",
    lambda s: s.overwrite_frame(float("nan")),
    (VICTIM,),
)
simple(
    "infinite latent with a valid checksum",
    "signed",
    "contains NaN or infinity",
    lambda s: s.overwrite_frame(float("inf")),
    (VICTIM,),
)
simple(
    "NaN text with a valid checksum",
    "signed",
    "contains NaN or infinity",
    lambda s: s.overwrite_text(float("nan")),
    (VICTIM,),
)
simple(
    "index lists far more text than the clip has",
    "signed",
    "text tokens, but the clip has another number or none",
    lambda s: s.sign(clips=s.changed(text_tokens=60)),
    (VICTIM,),
)
simple(
    "index lists slightly more text than the clip has",
    "signed",
    "text tokens, but the clip has another number or none",
    lambda s: s.sign(clips=s.changed(text_tokens=3)),
    (VICTIM,),
)


@fault("disk I/O error", "run", "cannot read .*Input/output error", SHARD_1)
def _(scene: Scene) -> Callable[[], None]:
    real, device = os.preadv, scene.shard.stat()

    def failing(descriptor, *rest):
        if os.fstat(descriptor).st_ino == device.st_ino:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *rest)

    reader_module.os.preadv = failing
    return lambda: setattr(reader_module.os, "preadv", real)


REMOTE = {
    "stall": r"cannot fetch .* after 2 attempts", "reset": r"cannot fetch .* after 2 attempts",
    "cut": r"cannot fetch .* after 2 attempts", "short": r"received \d+ of \d+ bytes", "error": r"cannot fetch .*503",
}  # fmt: skip
for _kind, _says in REMOTE.items():
    simple(
        f"remote: {_kind} at every attempt",
        "remote",
        _says,
        lambda server, kind=_kind: server.faults.update({"shard-000001.tar": [kind] * 10**6}),
        SHARD_1,
    )
simple(
    "remote: shard missing",
    "remote",
    r"after 1 attempt \(not found\)",
    lambda server: (server.folder / "shard-000001.tar").unlink(),
    SHARD_1,
)


def _bad_record(**changes) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        good = scene.records[0]
        fields = {"key": "new", "latents": good.latents, "text": good.text} | {
            n: make(good) for n, make in changes.items()
        }
        ShardSetWriter(scene.scratch / "new", META).write_shard(0, (ClipRecord(**fields) for _ in range(1)))

    return inject


simple(
    "encode: NaN latents",
    "encode",
    "latents must be finite in bfloat16",
    _bad_record(latents=lambda r: r.latents * float("nan")),
)
simple(
    "encode: latents infinite in bfloat16",
    "encode",
    "latents must be finite in bfloat16",
    _bad_record(latents=lambda r: r.latents.float() * 0 + 3.4e38),
)
simple(
    "encode: clip without frames",
    "encode",
    r"latents must have shape .*, got \(0,",
    _bad_record(latents=lambda r: r.latents[:0]),
)
simple(
    "encode: wrong channel count",
    "encode",
    "has 3 channels, but the set has 4",
    _bad_record(latents=lambda r: r.latents[:, :3]),
)
simple(
    "encode: text of another width",
    "encode",
    "text of width 5, but the set has 6",
    _bad_record(text=lambda r: r.text[:, :5]),
)
simple("encode: key that is a path", "encode", "clip key must be", _bad_record(key=lambda r: "../up"))


@fault("encode: two shards with one key", "encode", "clips clip_000 and clip_000 have the same id")
def _(scene: Scene) -> None:
    writer = ShardSetWriter(scene.scratch / "new", META)
    writer.write_shard(0, scene.records[:2])
    writer.write_shard(1, scene.records[:1])
    writer.finish()


@fault("encode: another set in the folder", "encode", "codec was patchify, is now ltx")
def _(scene: Scene) -> None:
    ShardSetWriter(scene.folder, replace(META, codec="ltx"))


HEAD = """# Data faults

Written by `python tests/faults/data/faults.py > docs/data_faults.md`; `make test-long` checks every row
(`tests/faults/data/test_faults.py`), kills an encoder at each of its writes, and fills its disk.

| fault | result |
|---|---|"""


def main() -> None:
    """Print the page."""
    print(HEAD)
    for entry in FAULTS:
        with tempfile.TemporaryDirectory() as scratch:
            found = happens(entry, Path(scratch)).replace(scratch, "").replace("|", "/")
        found = re.sub(r"(127\.0\.0\.1):\d+", r"\1", found)  # the port differs from run to run
        print(f"| {entry.name} | {found[:240]} |", flush=True)


if __name__ == "__main__":
    main()
