"""Invalid records and invalid fields of meta.json are refused by name."""

import json

import pytest
import torch

from flowception.errors import DataError
from flowception.shards.schema import ClipRecord, NullText, ShardFile, ShardMeta, same_text
from flowception.shards.writer import shard_name


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3.4e38])  # the last is finite only in float32
@pytest.mark.parametrize("part", ["latents", "text"])
def test_nan_and_infinity_are_refused(part, wrong):
    tensors = {"latents": torch.zeros(1, 4, 1, 1), "text": torch.zeros(2, 3)}
    ClipRecord(key="a", **tensors)
    tensors[part].view(-1)[1] = wrong
    with pytest.raises(DataError, match=f"clip a: {part} must be finite in bfloat16"):
        ClipRecord(key="a", **tensors)


@pytest.fixture
def described():
    meta = ShardMeta(
        codec="p",
        codec_fingerprint="1",
        latent_channels=4,
        latent_mean=[0, 0.5],
        codec_config={"patch_size": 4, "model": None},
        tokens_per_frame=[{"height": 1, "width": 1, "tokens": 2, "clips": 2}],
        shards=[ShardFile(name=shard_name(number), size_bytes=10, clips=1) for number in (0, 123456)],
    )
    return json.loads(meta.to_json())


def test_meta_json_round_trips(described):
    meta = ShardMeta.from_json(json.dumps(described), "meta.json")
    assert json.loads(meta.to_json()) == described


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codec", 3), ("latent_channels", "4"), ("latent_channels", True), ("latent_channels", 4.0),
        ("latent_mean", ["0"]), ("latent_std", 1.0), ("text_width", "6"), ("class_names", "red"),
        ("codec_config", []), ("tokens_per_frame", [{"height": 1.5}]), ("index_sha256", None),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_by_name(described, name, value):
    with pytest.raises(DataError, match=f"meta.json: {name} is "):
        ShardMeta.from_json(json.dumps(described | {name: value}), "meta.json")


@pytest.mark.parametrize("shards", [3, [3], [{"name": "shard-000000.tar"}], [{"name": 3, "size_bytes": 1, "clips": 1}]])
def test_malformed_shard_entries_are_refused(described, shards):
    with pytest.raises(DataError, match=r"does not describe a shard set|name is 3"):
        ShardMeta.from_json(json.dumps(described | {"shards": shards}), "meta.json")


@pytest.mark.parametrize("name", ["../shard-000001.tar", "shard-1.tar", "shard-000001.tar.gz", "shard-000000.tar"])
def test_shard_names_are_valid_and_unique(described, name):
    described["shards"][1]["name"] = name
    with pytest.raises(DataError, match="listed once, with a name like shard-000000.tar"):
        ShardMeta.from_json(json.dumps(described), "meta.json")


def test_the_null_text_is_stored_in_meta_json(described):
    embedding = torch.linspace(-3, 3, 12).view(2, 6).bfloat16()
    null_text = {"bf16_base64": NullText.of(embedding).bf16_base64, "crc": NullText.of(embedding).crc}
    meta = ShardMeta.from_json(json.dumps(described | {"text_width": 6, "null_text": null_text}), "meta.json")
    assert torch.equal(meta.null_embedding(), embedding)
    assert ShardMeta.from_json(json.dumps(described), "meta.json").null_embedding() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "has text of width 6 but no null text"),
        ({"crc": 1}, "does not match its checksum or width"),
        ({"bf16_base64": "AA=A"}, "is not base64"),
        ({"bf16_base64": 3}, "null_text: bf16_base64 is 3"),
    ],
)
def test_a_missing_or_damaged_null_text_is_refused(described, changes, message):
    good = NullText.of(torch.ones(1, 6))
    null_text = None if changes is None else {"bf16_base64": good.bf16_base64, "crc": good.crc} | changes
    with pytest.raises(DataError, match=message):
        ShardMeta.from_json(
            json.dumps(described | {"text_width": 6, "null_text": null_text}), "meta.json"
        ).null_embedding()


def test_same_text_allows_rounding_and_nothing_else():
    embedding = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert same_text(embedding, embedding.bfloat16())
    assert not same_text(embedding, torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
    assert not same_text(embedding, embedding[:2])
