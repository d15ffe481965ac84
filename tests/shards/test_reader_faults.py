"""Damage to a set is detected, and the error names the shard and the clip."""

import io
import tarfile

import numpy as np
import pytest

from flowception.errors import DataError
from flowception.shards.index import ClipIndex
from flowception.shards.reader import ShardReader
from flowception.shards.schema import ShardMeta


def damage(path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_bit_flip_in_a_frame_is_detected_and_the_other_frames_still_read(make_set):
    folder, records = make_set()
    reader = ShardReader(folder)
    row = next(i for i, r in enumerate(records) if len(r.latents) >= 4)
    clip, frame_bytes = reader.index.clips[row], records[row].latents[0].numel() * 2
    at = int(clip["latents_offset"]) + 2 * frame_bytes + 5
    path = folder / f"shard-{int(clip['shard']):06d}.tar"
    damage(path, at, bytes([path.read_bytes()[at] ^ 1]))
    with pytest.raises(DataError, match=rf"clip {records[row].key} in .*{path.name}: latent frame 2 does not match"):
        reader.read(row, np.arange(len(records[row].latents)))
    assert np.array_equal(reader.read(row, [1, 3]).float(), records[row].latents[[1, 3]].float())


def test_a_flipped_text_byte_is_detected(make_set):
    folder, records = make_set(text=True)
    reader = ShardReader(folder)
    clip = reader.index.clips[3]
    damage(folder / "shard-000000.tar", int(clip["latents_offset"]) - 1024, b"\x07")
    with pytest.raises(DataError, match=f"clip {records[3].key} in .*headers, metadata or text"):
        reader.read_text(3)
    with pytest.raises(DataError, match=f"clip {records[3].key}"):
        reader.read_metadata(3)


def test_a_damaged_header_is_detected_where_tar_readers_stop_silently(make_set):
    folder, records = make_set()
    path = folder / "shard-000001.tar"
    reader = ShardReader(folder)
    damage(path, int(reader.index.clips[14]["start"]), np.random.default_rng(0).bytes(512))
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        assert len(tar.getnames()) == 8
    with pytest.raises(DataError, match=rf"clip {records[14].key} in .*{path.name}"):
        reader.read_text(14)
    assert reader.read_text(15) is None


def test_a_truncated_shard_is_named_on_opening(make_set):
    folder, _ = make_set()
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=rf"{path.name} has \d+ bytes, expected \d+"):
        ShardReader(folder)


def test_a_shard_truncated_while_the_set_is_open_is_named(make_set):
    folder, records = make_set()
    reader = ShardReader(folder)
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=rf"clip {records[29].key} in .*{path.name}: the shard is truncated"):
        reader.read(29, [0])


def test_a_missing_shard_is_named(make_set):
    folder, records = make_set()
    reader = ShardReader(folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard .*shard-000001.tar is missing"):
        ShardReader(folder)
    with pytest.raises(DataError, match=rf"cannot read clip {records[12].key} in .*shard-000001.tar \("):
        reader.read(12, [0])


def test_another_codec_is_refused(make_set):
    folder, _ = make_set()
    with pytest.raises(DataError, match="encoded with codec 'patchify'.*this run uses 'ltx'"):
        ShardReader(folder, codec="ltx")
    with pytest.raises(DataError, match="codec fingerprint 'abc'"):
        ShardReader(folder, codec="patchify", codec_fingerprint="abd")


def test_a_changed_index_is_refused(make_set):
    folder, _ = make_set()
    index = ClipIndex.load(folder)
    clips = np.array(index.clips)
    clips["frames"][4] += 1
    ClipIndex(clips, np.array(index.frame_checksum), np.array(index.keys)).save(folder)
    with pytest.raises(DataError, match="does not match meta.json"):
        ShardReader(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("latents_offset", 2**40), ("latents_offset", 2**63 - 1), ("start", 2**63), ("json_bytes", 2**31), ("shard", 77)],
)
def test_offsets_outside_the_shard_are_refused_even_with_a_matching_hash(make_set, field, value):
    folder, _ = make_set()
    index = ClipIndex.load(folder)
    clips = np.array(index.clips)
    clips[field][4] = value
    hostile = ClipIndex(clips, np.array(index.frame_checksum), np.array(index.keys))
    hostile.save(folder)
    meta = ShardMeta.load(folder)
    meta.index_sha256 = hostile.fingerprint()
    (folder / "meta.json").write_text(meta.to_json())
    with pytest.raises(DataError, match="outside its shard|does not list"):
        ShardReader(folder)


@pytest.mark.parametrize("name", ["index-clips.npy", "index-keys.npy", "meta.json"])
def test_a_missing_or_truncated_index_file_is_refused(make_set, name):
    folder, _ = make_set()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=name.split(".")[0]):
        ShardReader(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=name.split(".")[0]):
        ShardReader(folder)


def test_pickled_index_files_are_never_loaded(make_set):
    folder, _ = make_set()
    np.save(folder / "index-keys.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="index-keys"):
        ShardReader(folder)


@pytest.mark.parametrize("frames", [[-1], [0, 0], [1, 0], [99]])
def test_frame_numbers_are_checked(make_set, frames):
    folder, _ = make_set()
    with pytest.raises(DataError, match="frame numbers must increase within"):
        ShardReader(folder).read(0, frames)


def test_another_schema_version_is_refused(make_set):
    folder, _ = make_set()
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 9'))
    with pytest.raises(DataError, match="schema_version 2, got 9"):
        ShardReader(folder)
