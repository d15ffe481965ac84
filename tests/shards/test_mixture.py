"""Several sets as one, with weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowception.data.loader import PackLoader
from flowception.data.order import repeat_ids, times_shown
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor
from flowception.errors import ConfigError, DataError
from flowception.shards.index import ClipIndex
from flowception.shards.open import DataConfig, SetShare, open_reader
from flowception.shards.reader import ShardReader
from flowception.shards.schema import NullText, ShardMeta
from flowception.shards.writer import ShardSetWriter


@pytest.fixture
def two_sets(make_set, tmp_path):
    """A set of clips 0 to 29 and one of clips 30 to 49."""
    first, records = make_set(count=50, per_shard=10, name="all")
    meta = ShardMeta.load(first)
    for name, part in (("a", records[:30]), ("b", records[30:])):
        writer = ShardSetWriter(tmp_path / name, meta)
        for shard in range(len(part) // 10):
            writer.write_shard(shard, part[10 * shard : 10 * shard + 10])
        writer.finish()
    return tmp_path / "a", tmp_path / "b", records


def mixture_of(folders, weights):
    return open_reader(DataConfig(mixture=[SetShare(path=str(f), weight=w) for f, w in zip(folders, weights)]))


def test_rows_map_to_the_clips_of_both_sets(two_sets):
    *folders, records = two_sets
    reader = mixture_of(folders, (1, 2))
    for row, wanted in enumerate(records):
        assert reader.index.key(row) == wanted.key
        assert torch.equal(reader.read_clip(row, np.arange(len(wanted.latents)))[0], wanted.latents)
    assert len(set(reader.index.clips["shard"].tolist())) == 5


def test_weights_are_the_mean_times_shown():
    weights = np.repeat([0.25, 1.0, 2.5], 20000)
    times = times_shown(weights, np.random.default_rng(0).random(60000))
    assert set(times[20000:40000]) == {1}
    assert set(times[40000:]) == {2, 3}
    for part, expected in ((slice(0, 20000), 0.25), (slice(40000, None), 2.5)):
        assert abs(times[part].mean() - expected) < 4 * (0.25 / 20000) ** 0.5


def test_repeats_are_shuffled_independently():
    ids = np.array([7, 9, 11], dtype=np.uint64)
    repeated = repeat_ids(ids, np.array([2, 0, 3]))
    assert repeated[0] == 7
    assert repeated[2] == 11
    assert len(set(repeated.tolist())) == 5


def test_an_epoch_shows_each_clip_as_often_as_its_weight(two_sets, make_config, make_spec):
    *folders, records = two_sets
    reader = mixture_of(folders, (0.5, 2))
    config = make_config(packs_per_step=3, token_budget=100)
    plan = Plan(reader.index, None, *config, make_spec(), 1)
    shown = np.zeros((40, 50), np.int64)
    for epoch in range(40):
        for step in range(plan.steps_in_epoch(epoch)):
            for pack in plan.step(Cursor(epoch, step)).packs:
                np.add.at(shown[epoch], pack.rows, 1)
    assert np.all(shown[:, 30:] == 2)
    assert set(shown[:, :30].ravel()) == {0, 1}
    assert abs(shown[:, :30].mean() - 0.5) < 4 * (0.25 / 1200) ** 0.5
    assert len({tuple(row) for row in shown[:, :30].tolist()}) > 30  # each epoch draws another half
    batches = list(PackLoader(plan, reader, cursor=Cursor(3, 0), num_workers=1))
    assert sum(len(pack.keys) for batch in batches for pack in batch.packs) == shown[3].sum()
    again = Plan(mixture_of(folders, (0.5, 2)).index, None, *config, make_spec(), 1)
    assert again.fingerprint == plan.fingerprint
    assert again.order_hash(again.step(Cursor(3, 1))) == plan.order_hash(plan.step(Cursor(3, 1)))
    other = Plan(mixture_of(folders, (0.5, 3)).index, None, *config, make_spec(), 1)
    assert other.fingerprint != plan.fingerprint


def test_weights_of_one_yield_the_plan_of_the_joined_index(two_sets, make_config, make_spec):
    *folders, _ = two_sets
    index = mixture_of(folders, (1, 1)).index
    plain = ClipIndex(index.clips, index.frame_checksum, index.keys)
    first, second = (Plan(i, None, *make_config(), make_spec(), 1) for i in (index, plain))
    assert first.order_hash(first.step(Cursor())) == second.order_hash(second.step(Cursor()))


def test_incompatible_sets_are_refused(two_sets, tmp_path):
    a, b, records = two_sets
    with pytest.raises(DataError, match=r"clip clip_000 is in both .*a and .*all"):
        mixture_of((a, tmp_path / "all"), (1, 1))
    with pytest.raises(ConfigError, match=r"weight of .*b must be a number > 0 .*, got 0"):
        mixture_of((a, b), (1, 0))
    with pytest.raises(ConfigError, match="exactly one of data.path and data.mixture must be set, got '.*' and 1 sets"):
        DataConfig(path=str(a), mixture=[SetShare(path=str(b))])
    with pytest.raises(ConfigError, match="exactly one of data.path and data.mixture must be set, got null and 0 sets"):
        DataConfig()
    for field, value in (("codec_fingerprint", "other"), ("class_names", ["x"])):
        meta = ShardReader(b).meta
        setattr(meta, field, value)
        writer = ShardSetWriter(tmp_path / field, meta)
        writer.write_shard(0, records[30:])
        writer.finish()
        with pytest.raises(DataError, match="with the same codec and text encoder|mean two things"):
            mixture_of((a, tmp_path / field), (1, 1))


def set_with(folder, records, meta, **changes):
    writer = ShardSetWriter(folder, replace(meta, **changes))
    writer.write_shard(0, records)
    writer.finish()
    return folder


def test_null_texts_may_differ_by_rounding_only(make_set, tmp_path):
    folder, records = make_set(count=20, text=True, name="all")
    meta = ShardMeta.load(folder)
    null_text = meta.null_embedding()
    a = set_with(tmp_path / "a", records[:10], meta)
    rounded = set_with(tmp_path / "b", records[10:], meta, null_text=NullText.of(null_text * 1.01))
    assert NullText.of(null_text * 1.01) != meta.null_text
    assert torch.equal(mixture_of((a, rounded), (1, 1)).null_text, null_text)
    for name, other in (("c", null_text * 2), ("d", torch.cat([null_text, null_text]))):
        changed = set_with(tmp_path / name, records[10:], meta, null_text=NullText.of(other))
        with pytest.raises(DataError, match=r"different null texts .*, of shapes \(\d+, 6\) and \(\d+, 6\)") as caught:
            mixture_of((a, changed), (1, 1))
        assert len(str(caught.value)) < 800


def test_a_set_without_classes_mixes_with_one_that_has_them(two_sets, tmp_path):
    *_, records = two_sets
    meta = ShardMeta.load(tmp_path / "a")
    labeled = [replace(each, class_label=1) for each in records[:10]]
    plain = [replace(each, class_label=None) for each in records[10:20]]
    a = set_with(tmp_path / "named", labeled, meta, class_names=["x", "y"])
    b = set_with(tmp_path / "none", plain, meta, class_names=[])
    for folders in ((a, b), (b, a)):
        reader = mixture_of(folders, (1, 1))
        assert reader.meta.class_names == ["x", "y"]
        assert sorted(set(reader.index.clips["class_label"].tolist())) == [-1, 1]
    unnamed = set_with(tmp_path / "unnamed", [replace(each, class_label=0) for each in plain], meta, class_names=[])
    with pytest.raises(DataError, match=r"unnamed has class labels but no class names"):
        mixture_of((a, unnamed), (1, 1))
