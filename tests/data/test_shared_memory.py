"""Sending packs between processes: all their tensors in one block."""

import dataclasses
import pickle

import pytest
import torch

from flowception.data.pack import build_pack, empty_pack
from flowception.data.plan import Plan
from flowception.data.shared_memory import SentPacks
from flowception.data.step_plan import Cursor
from flowception.packing.layout import PackLayout
from flowception.shards.reader import ShardReader


@pytest.fixture(params=[True, False], ids=["text", "silent"])
def packs(request, make_set, make_config, make_spec):
    """Packs of one step, and an empty pack."""
    folder, _ = make_set(count=60, text=request.param)
    reader = ShardReader(folder)
    spec = make_spec(**({"text_dim": 6} if request.param else {}))
    null = 0 if reader.null_text is None else len(reader.null_text)
    plan = Plan(reader.index, None, *make_config(packs_per_step=2), spec, 1, null_text_tokens=null)
    return [*(build_pack(plan, pack, reader) for pack in plan.step(Cursor()).packs), empty_pack(plan)]


def assert_same(sent, pack):
    assert type(sent) is type(pack)
    for known in dataclasses.fields(pack):
        ours, theirs = getattr(sent, known.name), getattr(pack, known.name)
        if isinstance(theirs, PackLayout):
            assert_same(ours, theirs)
        elif isinstance(theirs, torch.Tensor):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), known.name
            assert torch.equal(ours, theirs), known.name
        else:
            assert ours == theirs, known.name


def test_packs_arrive_as_they_were_sent(packs):
    sent = pickle.loads(pickle.dumps(SentPacks.of(packs)))
    for came, pack in zip(sent.packs(), packs, strict=True):
        assert_same(came, pack)


def test_all_tensors_are_views_of_the_block(packs):
    sent = SentPacks.of(packs)
    block = sent.block.untyped_storage().data_ptr()
    for pack in sent.packs():
        assert pack.noisy.untyped_storage().data_ptr() == block
        assert pack.layout.cu_seqlens.untyped_storage().data_ptr() == block
        assert pack.text is None or not len(pack.text) or pack.text.untyped_storage().data_ptr() == block
