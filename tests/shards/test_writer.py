import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset

from flowception.errors import DataError
from flowception.shards.index import ClipIndex
from flowception.shards.reader import ShardReader
from flowception.shards.schema import ClipRecord, NullText, ShardMeta, check_key
from flowception.shards.writer import ShardSetWriter


def bf16(content: bytes, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(shape)


def small_record(key: str, **keys) -> ClipRecord:
    return ClipRecord(key=key, latents=torch.zeros(1, 4, 1, 1), **keys)


def test_webdataset_reads_the_tars(make_set):
    folder, records = make_set(text=True)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [r.key for r in records]
    for sample, wanted in zip(samples, records):
        described = json.loads(sample["json"])
        assert torch.equal(bf16(sample["latents.bf16"], *described["latents_shape"]), wanted.latents)
        assert described["caption"] == wanted.caption
        assert described["class_label"] == wanted.class_label
        assert ("text.bf16" in sample) == (wanted.text is not None)
        if wanted.text is not None:
            assert torch.equal(bf16(sample["text.bf16"], *described["text_shape"]), wanted.text)


def test_a_shard_is_a_plain_tar(make_set):
    folder, _ = make_set(count=3, per_shard=3)
    with tarfile.open(folder / "shard-000000.tar") as tar:
        assert [m.name for m in tar] == [f"clip_00{i}.{s}" for i in range(3) for s in ("json", "latents.bf16")]


def test_reader_returns_what_was_written_complete_and_in_part(make_set):
    folder, records = make_set(text=True)
    reader = ShardReader(folder, codec="patchify", codec_fingerprint="abc")
    random = np.random.default_rng(0)
    for row, wanted in enumerate(records):
        frames = len(wanted.latents)
        assert torch.equal(reader.read(row, np.arange(frames)), wanted.latents)
        some = np.flatnonzero(random.random(frames) < 0.5)
        assert torch.equal(reader.read(row, some), wanted.latents[some])
        for text in (reader.read_text(row), reader.read_clip(row, some)[1]):
            assert (text is None and wanted.text is None) or torch.equal(text, wanted.text)
        assert torch.equal(reader.read_clip(row, some)[0], wanted.latents[some])
        assert reader.read_metadata(row)["source"] == wanted.source


def test_meta_describes_the_set(make_set):
    folder, records = make_set(count=25, per_shard=10)
    meta = ShardMeta.load(folder)
    assert meta.clips == 25
    assert meta.latent_frames == sum(len(r.latents) for r in records)
    assert [(s.name, s.clips) for s in meta.shards] == [(f"shard-00000{i}.tar", n) for i, n in enumerate((10, 10, 5))]
    assert meta.tokens_per_frame == [
        {"height": 2, "width": 3, "tokens": 7, "clips": 13},
        {"height": 3, "width": 3, "tokens": 10, "clips": 12},
    ]


def test_a_killed_encoder_continues_at_the_first_unfinished_shard(tmp_path, make_set):
    reference, records = make_set(count=20, per_shard=10)
    meta = ShardMeta(codec="patchify", codec_fingerprint="abc", latent_channels=4)

    def dying():
        yield from records[10:14]
        raise KeyboardInterrupt

    writer = ShardSetWriter(tmp_path / "again", meta)
    writer.write_shard(0, records[:10])
    with pytest.raises(KeyboardInterrupt):
        writer.write_shard(1, dying())
    second = ShardSetWriter(tmp_path / "again", meta)
    assert [second.is_finished(i) for i in range(2)] == [True, False]
    assert not (tmp_path / "again" / "shard-000001.tar").exists()
    assert second.finished_keys(0) == [r.key for r in records[:10]]
    second.write_shard(1, records[10:])
    second.finish()
    for name in ("shard-000000.tar", "shard-000001.tar", "index-clips.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (reference / name).read_bytes()


def test_rewriting_a_shard_makes_a_finished_set_unfinished(make_set):
    folder, records = make_set(count=6, per_shard=3)
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    writer = ShardSetWriter(folder, ShardReader(folder).meta)

    def dying():
        assert not (folder / "meta.json").exists()
        yield records[3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_shard(1, dying())
    assert not (folder / "meta.json").exists()
    assert (writer.is_finished(0), writer.is_finished(1)) == (True, False)
    writer.write_shard(1, records[3:])
    writer.finish()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    writer.write_shard(1, [])
    writer.finish()
    assert [path.name for path in folder.glob("*.tar")] == ["shard-000000.tar"]
    assert len(ShardReader(folder).index) == 3


def test_the_error_of_a_full_disk_names_the_file_and_how_to_continue(tmp_path, make_set):
    """``/dev/full`` fails every write like a full disk."""
    _, records = make_set(count=4, per_shard=4)
    meta = ShardMeta(codec="patchify", codec_fingerprint="abc", latent_channels=4)
    writer = ShardSetWriter(tmp_path / "full", meta)
    (tmp_path / "full" / ".shard-000000.tar.partial").symlink_to("/dev/full")
    with pytest.raises(DataError) as refusal:
        writer.write_shard(0, records)
    assert str(refusal.value) == (
        f"cannot write {tmp_path / 'full' / 'shard-000000.tar'} (No space left on device); free or repair the disk "
        "and run the same command again: it continues at the first unfinished shard"
    )
    (tmp_path / "full" / ".shard-000000.tar.partial").unlink()
    assert writer.write_shard(0, records) == 4
    assert writer.finish().clips == 4


def test_a_folder_of_another_codec_is_not_continued(tmp_path):
    ShardSetWriter(tmp_path, ShardMeta(codec="ltx", codec_fingerprint="1", latent_channels=128))
    with pytest.raises(DataError, match="codec was ltx, is now patchify"):
        ShardSetWriter(tmp_path, ShardMeta(codec="patchify", codec_fingerprint="1", latent_channels=128))


def test_a_shard_without_clips_is_finished_and_a_set_without_clips_is_refused(tmp_path):
    meta = ShardMeta(codec="patchify", codec_fingerprint="1", latent_channels=4)
    writer = ShardSetWriter(tmp_path, meta)
    assert writer.write_shard(0, []) == 0
    assert writer.is_finished(0)
    with pytest.raises(DataError, match="no clips were written"):
        writer.finish()
    writer.write_shard(1, [small_record("a")])
    assert writer.finish().clips == 1
    assert torch.equal(ShardReader(tmp_path).read(0, [0]), torch.zeros(1, 4, 1, 1))


@pytest.mark.parametrize("key", ["", "../up", "a.b", "a/b", "sp ace", "é", "a\n", "x" * 81])
def test_keys_that_could_be_paths_are_refused(key):
    with pytest.raises(DataError, match="clip key must be 1 to 80 letters"):
        check_key(key)


def test_equal_keys_are_refused(tmp_path):
    writer = ShardSetWriter(tmp_path, ShardMeta(codec="p", codec_fingerprint="1", latent_channels=4))
    writer.write_shard(0, [small_record("a"), small_record("b")])
    writer.write_shard(1, [small_record("a")])
    with pytest.raises(DataError, match="clips a and a have the same id"):
        writer.finish()


def test_the_split_is_by_key_and_of_the_requested_size():
    index = ClipIndex.from_arrays(frames=np.full(20000, 3), height=2, width=2)
    train, held = index.split(0.1)
    assert len(train) + len(held) == 20000
    assert not np.intersect1d(train, held).size
    assert abs(len(held) / 20000 - 0.1) < 4 * (0.09 / 20000) ** 0.5
    larger = ClipIndex.from_arrays(frames=np.full(30000, 3), height=2, width=2)
    assert np.array_equal(larger.split(0.1)[1][: len(held)], held)


def test_jobs_of_one_set_share_the_null_text_of_the_first(make_set):
    folder, _ = make_set(text=True)
    meta = ShardMeta.load(folder)
    first = meta.null_embedding()
    meta.null_text = NullText.of(first.float() * 1.01)
    assert torch.equal(ShardSetWriter(folder, meta).finish().null_embedding(), first)
    meta.null_text = NullText.of(-first)
    with pytest.raises(DataError, match="started with another text encoder"):
        ShardSetWriter(folder, meta)
    meta.null_text = None
    with pytest.raises(DataError, match="no null text"):
        ShardSetWriter(folder, meta)
