import dataclasses

import numpy as np
import pytest
import torch

from flowception import rng
from flowception.data.pack import build_pack, empty_pack, model_role
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor, PackPlan
from flowception.errors import ConfigError, DataError
from flowception.flow.task import Role
from flowception.packing.layout import ModelRole, TokenKind
from flowception.rng import Stream
from flowception.shards.reader import ShardReader

SEED = 11


@pytest.fixture
def world(make_set, make_config, make_spec):
    """A set with text, and a plan with both tasks and a time shift."""
    folder, records = make_set(text=True)
    reader = ShardReader(folder)
    config = make_config(tasks={"t2v": 0.5, "i2v": 0.5}, time_shift=3.0, condition_dropout=0.3, insertion_share=0.7)
    return Plan(reader.index, None, *config, make_spec(text_dim=6), SEED, null_text_tokens=2), reader, records


def packs_of_epoch(plan, epoch=0):
    return [p for s in range(plan.steps_in_epoch(epoch)) for p in plan.step(Cursor(epoch, s)).packs]


def test_contents_of_a_pack_frame_by_frame(world):
    """Everything in the pack is recomputed from the records, one frame at a time, without tensor masks."""
    plan, reader, records = world
    met = set()
    for pack_plan in packs_of_epoch(plan):
        pack = build_pack(plan, pack_plan, reader)
        draws = plan.clip_draws(pack_plan).clips
        token = frame_slot = text_row = 0
        for slot, row in enumerate(pack_plan.rows):
            record, key = records[row], int(reader.index.clips["clip_id"][row])
            dropped = rng.uniforms(SEED, Stream.CONDITION_DROPOUT, clip=key)[0] < 0.3
            clock, weight = float(draws.global_time[slot]), float(draws.weight[slot])
            assert weight == pytest.approx(0.5 / 0.7 if clock < 1 else 0.5 / 0.3)
            label = record.class_label if record.class_label is not None and not dropped else -1
            assert pack.class_label[slot] == label
            shown = record.text if record.text is not None and not dropped else torch.full((2, 6), 0.25)
            for line in shown:
                assert torch.equal(pack.text[text_row], line.bfloat16())
                assert pack.layout.text_token[text_row] == token
                assert not pack.velocity_mask[token]
                text_row, token = text_row + 1, token + 1
            times = (clock - draws.delay[slot]).tolist()
            roles, n = draws.roles[slot].tolist(), len(record.latents)
            visible = [i for i in range(n) if times[i] >= 0]
            for rank, i in enumerate(visible):
                following = visible[rank + 1] if rank + 1 < len(visible) else n
                own = min(max(times[i], 0.0), 1.0)
                shifted = own / (own + 3.0 * (1 - own))
                context = roles[i] == Role.CONTEXT_ACTIVE
                flow = not context and times[i] < 1
                met.add((Role(roles[i]), flow, clock < 1))
                assert pack.time[frame_slot] == pytest.approx(min(clock, 1.0) if context else shifted, abs=1e-6)
                assert pack.role[frame_slot] == (ModelRole.ACTIVE if context else ModelRole.GENERATED)
                assert pack.missing[frame_slot] == following - i - 1
                assert bool(pack.insertion_mask[frame_slot]) == (clock < 1)
                assert pack.weight_frame[frame_slot] == pytest.approx(weight)
                x_1 = record.latents[i].float()
                x_0 = torch.from_numpy(rng.normals(SEED, Stream.NOISE, tuple(x_1.shape), clip=key, frame=i))
                x_t = (1 - shifted) * x_0 + shifted * x_1 if flow else x_1
                for y in range(x_1.shape[1]):
                    for x in range(x_1.shape[2]):
                        assert torch.allclose(pack.noisy[token], x_t[:, y, x], atol=1e-6)
                        assert torch.equal(pack.condition[token], x_1[:, y, x] * context)
                        assert torch.equal(pack.velocity_target[token], (x_1 - x_0)[:, y, x] * flow)
                        assert bool(pack.velocity_mask[token]) == flow
                        assert pack.weight_token[token] == pytest.approx(weight)
                        token += 1
                assert pack.layout.insertion_token[frame_slot] == token
                assert pack.layout.token_kind[token] == TokenKind.INSERTION
                assert not pack.noisy[token].any()
                assert not pack.velocity_mask[token]
                token, frame_slot = token + 1, frame_slot + 1
        assert (pack.layout.token_kind[token:] == TokenKind.PADDING).all()
        for name in ("noisy", "condition", "velocity_target", "velocity_mask", "weight_token"):
            assert not getattr(pack, name)[token:].any(), name
        for name in ("time", "role", "missing", "insertion_mask", "weight_frame"):
            assert not getattr(pack, name)[frame_slot:].any(), name
        assert (pack.class_label[len(pack_plan.rows) :] == -1).all()
        assert pack.keys == tuple(records[row].key for row in pack_plan.rows)
    kinds = {(Role.START, True, True), (Role.FREE, True, True), (Role.FREE, True, False), (Role.FREE, False, False)}
    assert met >= kinds | {(Role.CONTEXT_ACTIVE, False, True), (Role.CONTEXT_ACTIVE, False, False)}


def test_a_clip_does_not_depend_on_its_pack_or_its_place_in_the_pack(world):
    plan, reader, _ = world
    pack_plan = max(packs_of_epoch(plan), key=lambda p: len(p.rows))
    whole = build_pack(plan, pack_plan, reader)
    for slot in range(len(pack_plan.rows)):
        rows, places = pack_plan.rows[slot : slot + 1], pack_plan.places[slot : slot + 1]
        alone = build_pack(plan, PackPlan(0, 7, rows, places), reader)
        start, size = sum(whole.layout.segment_lengths[:slot]), whole.layout.segment_lengths[slot]
        for name in ("noisy", "condition", "velocity_target", "velocity_mask", "weight_token"):
            assert torch.equal(getattr(alone, name)[:size], getattr(whole, name)[start : start + size])
        frames = whole.layout.frame_valid & (whole.layout.frame_clip == slot)
        for name in ("time", "role", "missing", "insertion_mask", "weight_frame"):
            assert torch.equal(getattr(alone, name)[: int(frames.sum())], getattr(whole, name)[frames])
        assert alone.class_label[0] == whole.class_label[slot]


def test_noise_is_keyed_by_the_epoch(world, make_config, make_spec):
    _, reader, records = world
    plan = Plan(reader.index, None, *make_config(), make_spec(), SEED)
    x_1, key = records[4].latents[0].float(), int(reader.index.clips["clip_id"][4])
    for epoch in (0, 1):  # at global time 0 frame 0 is a start frame of pure noise
        pack = build_pack(plan, PackPlan(epoch, 0, np.array([4]), np.array([0]), np.array([0.0])), reader)
        x_0 = torch.from_numpy(rng.normals(SEED, Stream.NOISE, tuple(x_1.shape), epoch=epoch, clip=key))
        assert torch.equal(pack.noisy[:6], x_0.permute(1, 2, 0).reshape(6, 4))
        assert torch.equal(pack.velocity_target[:6], (x_1 - x_0).permute(1, 2, 0).reshape(6, 4))


def test_prescribed_times_are_used(world):
    plan, reader, records = world
    rows = np.array([0, 1, 2])
    draws = plan.clip_draws(PackPlan(0, 0, rows, rows, np.array([0.0, 0.7, 0.85]))).clips
    assert draws.global_time.tolist() == pytest.approx([0.0, 1.0, 1.5])
    pack = build_pack(plan, PackPlan(0, 0, rows, rows, np.array([0.85] * 3)), reader)
    assert pack.layout.clip_frames[:3].tolist() == [len(records[i].latents) for i in rows]


def test_bad_clips_become_padding_in_place(world, make_set):
    plan, reader, records = world
    pack_plan = max(packs_of_epoch(plan), key=lambda p: len(p.rows))
    before = build_pack(plan, pack_plan, reader)
    row = int(pack_plan.rows[1])
    clip = reader.index.clips[row]
    with (reader.folder / f"shard-{int(clip['shard']):06d}.tar").open("r+b") as file:
        file.seek(int(clip["start"]))
        file.write(b"\xff" * 600)
    after = build_pack(plan, pack_plan, reader)
    assert [bad.key for bad in after.bad_clips] == [records[row].key]
    assert "do not match their checksum" in after.bad_clips[0].reason
    assert torch.equal(after.layout.cu_seqlens, before.layout.cu_seqlens)
    start, size = sum(before.layout.segment_lengths[:1]), before.layout.segment_lengths[1]
    inside = torch.zeros(plan.pack_shape.token_budget, dtype=torch.bool)
    inside[start : start + size] = True
    for name in ("noisy", "condition", "velocity_target", "velocity_mask", "weight_token"):
        assert not getattr(after, name)[inside].any(), name
        assert torch.equal(getattr(after, name)[~inside], getattr(before, name)[~inside]), name
    frames = before.layout.frame_valid & (before.layout.frame_clip == 1)
    for name in ("insertion_mask", "weight_frame", "missing", "time", "role"):
        assert not getattr(after, name)[frames].any(), name
        assert torch.equal(getattr(after, name)[~frames], getattr(before, name)[~frames]), name
    assert after.class_label[1] == -1


def test_a_skipped_clip_is_treated_like_an_unreadable_one(world):
    plan, reader, _ = world
    pack_plan = packs_of_epoch(plan)[0]
    key = plan.index.key(int(pack_plan.rows[1]))

    class Bad(ShardReader):
        def read_clip(self, row, frames):
            if row == pack_plan.rows[1]:
                raise DataError("the reason")
            return super().read_clip(row, frames)

    found = build_pack(plan, pack_plan, reader, {key: "the reason", "clip-of-another-pack": "another"})
    expected = build_pack(plan, pack_plan, Bad(reader.folder))
    assert found.bad_clips == expected.bad_clips
    assert [bad.key for bad in found.bad_clips] == [key]
    for field in dataclasses.fields(found):
        ours = getattr(found, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, getattr(expected, field.name)), field.name


def test_an_empty_pack_has_the_shapes_of_any_other_and_no_loss(world):
    plan, reader, _ = world
    full, empty = build_pack(plan, packs_of_epoch(plan)[0], reader), empty_pack(plan)
    for field in dataclasses.fields(full):
        ours, theirs = getattr(empty, field.name), getattr(full, field.name)
        if isinstance(ours, torch.Tensor):
            first = 1 if field.name == "text" else 0  # a pack has as many rows of text as it has tokens of text
            assert (ours.shape[first:], ours.dtype) == (theirs.shape[first:], theirs.dtype), field.name
    assert empty.text is None or len(empty.text) == 0
    assert (empty.layout.token_kind == TokenKind.PADDING).all()
    assert not empty.velocity_mask.any()
    assert not empty.insertion_mask.any()
    planned = PackPlan(0, 0, np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert torch.equal(build_pack(plan, planned, reader).noisy, empty.noisy)
    assert empty.to("cpu").keys == ()


def test_a_network_with_other_widths_is_refused(world, make_config, make_spec):
    plan, reader, _ = world
    pack_plan = packs_of_epoch(plan)[0]
    for keys, wanted in (({"in_channels": 8}, "in_channels=4"), ({"text_dim": 9}, "text_dim=6")):
        other = Plan(reader.index, None, *make_config(), make_spec(**keys), SEED, null_text_tokens=2)
        with pytest.raises(ConfigError, match=wanted):
            build_pack(other, pack_plan, reader)


def test_a_plan_for_another_null_text_is_refused(world, make_config, make_spec):
    _, reader, _ = world
    other = Plan(reader.index, None, *make_config(), make_spec(text_dim=6), SEED, null_text_tokens=1)
    with pytest.raises(ConfigError, match="null_text_tokens must be the length of the set's null text, got 1 and 2"):
        build_pack(other, packs_of_epoch(other)[0], reader)


def test_a_network_without_text_or_classes_gets_neither(world, make_config, make_spec):
    _, reader, _ = world
    plan = Plan(reader.index, None, *make_config(condition_dropout=0.0), make_spec(num_classes=0), SEED)
    pack = build_pack(plan, packs_of_epoch(plan)[0], reader)
    assert pack.text is None
    assert not (pack.layout.token_kind == TokenKind.TEXT).any()
    assert (pack.class_label == -1).all()


def test_model_roles_are_generated_active_or_passive():
    told = model_role(torch.tensor([int(role) for role in Role]))
    generated, active, passive = ModelRole.GENERATED, ModelRole.ACTIVE, ModelRole.PASSIVE
    assert told.tolist() == [generated, generated, generated, active, passive]
    assert told.dtype == torch.int64
