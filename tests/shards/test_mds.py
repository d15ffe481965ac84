"""MDS sets. These tests need an environment with mosaicml-streaming (``make setup-mds``) and fail without it."""

import json

import numpy as np
import pytest
import torch

from data_prep.convert_shards import convert
from flowception.data.loader import PackLoader
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor
from flowception.errors import DataError
from flowception.shards.mds import COLUMNS, MdsReader, import_streaming
from flowception.shards.open import open_set
from flowception.shards.reader import ShardReader
from tests.small_sets import NULL_TEXT_TOKENS

pytestmark = [pytest.mark.long, pytest.mark.mds]


@pytest.fixture
def both(make_set, tmp_path):
    """Readers of one set as tars and as MDS, and its clips."""
    folder, records = make_set(count=60, text=True)
    assert convert(folder, tmp_path / "mds", shard_bytes=10_000) == 60
    return ShardReader(folder), MdsReader(tmp_path / "mds"), records


def test_the_library_itself_reads_the_set(both):
    _, reader, records = both
    assert len(reader.meta.shards) > 3
    dataset = import_streaming().StreamingDataset(local=str(reader.folder), batch_size=1, shuffle=False)
    samples = {sample["key"].decode(): sample for sample in dataset}
    assert set(samples) == {record.key for record in records}
    for record in records:
        sample = samples[record.key]
        assert set(sample) == set(COLUMNS)
        shape = json.loads(sample["json"])["latents_shape"]
        latents = torch.frombuffer(bytearray(sample["latents"]), dtype=torch.bfloat16).view(shape)
        assert torch.equal(latents, record.latents)


def test_both_formats_yield_the_same_packs(both, make_config, make_spec):
    tars, mds, _ = both
    assert type(open_set(mds.folder)) is MdsReader
    plan = Plan(
        mds.index,
        None,
        *make_config(packs_per_step=4, token_budget=120),
        make_spec(text_dim=6),
        1,
        null_text_tokens=NULL_TEXT_TOKENS,
    )
    for epoch in (0, 1):
        batches = [list(PackLoader(plan, reader, cursor=Cursor(epoch, 0))) for reader in (tars, mds)]
        keys = [key for batch in batches[1] for pack in batch.packs for key in pack.keys]
        assert sorted(keys) == [f"clip_{number:03d}" for number in range(60)]
        for first, second in zip(*batches, strict=True):
            for ours, theirs in zip(first.packs, second.packs):
                assert not theirs.bad_clips
                assert ours.keys == theirs.keys
                assert torch.equal(ours.noisy, theirs.noisy)
                assert torch.equal(ours.text, theirs.text)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_mds_run_continues_exactly_at_any_world_size(both, make_config, make_spec, num_workers):
    _, reader, _ = both
    plan = Plan(reader.index, None, *make_config(packs_per_step=4, token_budget=120), make_spec(), 1)
    whole = list(PackLoader(plan, reader))
    cursor = whole[1].next_cursor
    for world_size in (1, 2, 3, 4):
        ranks = [
            list(PackLoader(plan, MdsReader(reader.folder), rank, world_size, cursor, num_workers))
            for rank in range(world_size)
        ]
        for expected, *parts in zip(whole[2:], *ranks, strict=True):
            for number, pack in enumerate(expected.packs):
                found = parts[number % world_size].packs[number // world_size]
                assert found.keys == pack.keys
                assert torch.equal(found.noisy, pack.noisy)


def test_damage_to_an_mds_shard_is_named(both):
    _, reader, records = both
    row = next(i for i, record in enumerate(records) if len(record.latents) > 3)
    path = reader.folder / reader.meta.shards[int(reader.index.clips["shard"][row])].name
    content = bytearray(path.read_bytes())
    at = content.index(records[row].latents[2].view(torch.uint8).numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"clip {records[row].key} in .*{path.name}: latent frame 2"):
        reader.read(row, np.arange(3))
    assert torch.equal(reader.read(row, [0, 1]), records[row].latents[:2])
    path.write_bytes(content[:100])
    with pytest.raises(DataError, match=rf"shard .*{path.name} has 100 bytes"):
        MdsReader(reader.folder)
    with pytest.raises(DataError, match=f"clip {records[row].key}"):
        MdsReader.read(replace_last(reader), row, [0])
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} is missing"):
        MdsReader(reader.folder)


def replace_last(reader: MdsReader) -> MdsReader:
    """The reader without its cached clip."""
    reader._last = None
    return reader


def test_a_stale_mds_index_is_refused(both, tmp_path):
    _, reader, _ = both
    path = reader.folder / "index.json"
    described = json.loads(path.read_text())
    described["shards"].pop()
    path.write_text(json.dumps(described))
    with pytest.raises(DataError, match="list different shards"):
        MdsReader(reader.folder)
    path.write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*index.json \("):
        MdsReader(reader.folder)
    with pytest.raises(DataError, match="must be a set in format 'webdataset-tar', got 'mds'"):
        ShardReader(reader.folder)


def test_an_existing_folder_is_not_overwritten(both, tmp_path):
    tars, mds, _ = both
    with pytest.raises(DataError, match="exists"):
        convert(tars.folder, mds.folder, 1000)
    assert mds.meta == MdsReader(mds.folder).meta
