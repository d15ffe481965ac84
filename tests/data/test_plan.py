import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowception import rng
from flowception.data import epoch as epoch_module
from flowception.data.clip_costs import ClipCosts
from flowception.data.epoch import StepMaker
from flowception.data.plan import Plan
from flowception.data.plan_table import cursor_at, plan_table
from flowception.data.step_plan import Cursor, PackPlan, PlanConfig, check_world_size
from flowception.errors import ConfigError, DataError, PlanError
from flowception.evaluation.toy.world import LENGTH_LAW
from flowception.flow.extended_time import expected_attention_ratio
from flowception.packing.flops import ModelSpec, clip_flops
from flowception.rng import Stream
from flowception.shards.index import ClipIndex
from flowception.training.config import load_config


@pytest.fixture
def index():
    random = np.random.default_rng(2)
    return ClipIndex.from_arrays(
        frames=random.integers(1, 9, 700), height=random.integers(1, 4, 700), width=2, clips_per_shard=40
    )


@pytest.fixture
def plan(index, make_config, make_spec):
    return Plan(index, None, *make_config(tasks={"t2v": 0.5, "i2v": 0.5}), make_spec(), seed=3)


def all_steps(plan, epoch):
    return [plan.step(Cursor(epoch, step)) for step in range(plan.steps_in_epoch(epoch))]


def test_hashes_are_equal_for_all_world_sizes_and_from_any_start(index, plan, make_config, make_spec):
    tables = {w: plan_table(plan, w, 0, 50) for w in (1, 2, 3, 4, 8)}
    assert plan.steps_in_epoch(0) < 50  # the table crosses an epoch
    for table in tables.values():
        assert table == tables[1]
    for start in (1, 17, 49):
        fresh = Plan(index, None, *make_config(tasks={"t2v": 0.5, "i2v": 0.5}), make_spec(), seed=3)
        assert plan_table(fresh, 3, start, 50 - start) == tables[1][start:]
    assert len({entry["order_hash"] for entry in tables[1]}) == 50
    assert set(tables[1][0]) == {
        "step", "order_hash", "clips", "tokens", "fill", "flops_imbalance", "attention_ratio",
    }  # fmt: skip
    json.dumps(tables[1])


def test_an_epoch_has_every_clip_once_and_visible_frames_as_drawn(index, plan):
    for epoch in (0, 1):
        seen = []
        for step in all_steps(plan, epoch):
            for pack in step.packs:
                draws = plan.clip_draws(pack).clips
                tokens = draws.visible_frames.numpy() * index.tokens_per_frame[pack.rows]
                assert tokens.sum() <= 200
                assert np.array_equal(draws.num_frames.numpy(), index.clips["frames"][pack.rows])
                seen.append(pack.rows)
        assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(len(index)))


def test_figures_of_a_step_match_its_packs(index, plan, make_spec):
    step = plan.step(Cursor(0, 2))
    draws = [plan.clip_draws(p).clips for p in step.packs]
    visible = [d.visible_frames.numpy() for d in draws]
    per_frame = [index.tokens_per_frame[p.rows] for p in step.packs]
    grids = [(index.clips["height"][p.rows], index.clips["width"][p.rows]) for p in step.packs]
    tokens = [int((v * t).sum()) for v, t in zip(visible, per_frame)]
    flops = [clip_flops(make_spec(), v, h, w).sum() for v, (h, w) in zip(visible, grids)]
    assert step.tokens == sum(tokens)
    assert step.clips == sum(len(v) for v in visible)
    assert step.fill == pytest.approx(sum(tokens) / 1600)
    assert step.flops_imbalance == pytest.approx(max(flops) / np.mean(flops) - 1)
    assert flops == sorted(flops, reverse=True)
    pairs = sum(((v * t) ** 2).sum() for v, t in zip(visible, per_frame))
    full = sum(((d.num_frames.numpy() * t) ** 2).sum() for d, t in zip(draws, per_frame))
    assert step.attention_ratio == pytest.approx(pairs / full)


def test_denominators_of_a_small_example(make_config, make_spec):
    # Clips of 5 frames of 2 x 3, 4 channels, text-to-video with 3 starts, linear kappa.
    index = ClipIndex.from_arrays(frames=[5, 5], height=2, width=3)
    step = Plan(index, None, *make_config(), make_spec(), seed=0).step(Cursor())
    assert step.velocity_denominator == pytest.approx(2 * 5 / 2 * 24)
    assert step.insertion_denominator == pytest.approx(2 * (3 + 2 * 0.5) / 2)


def test_only_the_last_step_is_short(plan):
    steps = all_steps(plan, 0)
    assert min(step.fill for step in steps[:-1]) > 0.9


def test_a_short_clip_among_long_ones_does_not_wait_forever():
    # Packs of 10: the clip of 3 never fits next to one of 8, and longest-first would always take the 8.
    tokens = np.array([3] + [8] * 9)
    ones = np.ones(10)

    def costs(places):
        return ClipCosts(tokens[places], tokens[places].astype(float), *(ones[places] for _ in range(4)))

    steps = StepMaker(np.arange(10), costs, PlanConfig(token_budget=10, packs_per_step=1, headroom=0.0))
    assert steps.count() == 10
    assert [steps.step(step).packs[0].tolist() for step in range(4)] == [[1], [2], [0], [3]]


def test_draws_of_a_clip_do_not_depend_on_other_requests(plan):
    rows, places = np.array([5, 60, 300]), np.array([17, 2, 600])
    together = plan.clip_draws(PackPlan(1, 0, rows, places)).clips
    for i in range(3):
        alone = plan.clip_draws(PackPlan(1, 0, rows[i : i + 1], places[i : i + 1])).clips
        frames = int(alone.num_frames[0])
        assert alone.global_time[0] == together.global_time[i]
        assert alone.task[0] == together.task[i]
        assert alone.roles[0, :frames].tolist() == together.roles[i, :frames].tolist()
        assert alone.frame_time[0, :frames].tolist() == together.frame_time[i, :frames].tolist()


def test_delays_and_roles_are_keyed_by_the_clip_and_not_by_its_row(index, plan, make_config, make_spec):
    # Uniform delays, linear kappa: tau_g - tau_i of a free frame is the uniform of (seed, epoch, clip, frame).
    draws = plan.clip_draws(PackPlan(2, 0, np.array([9]), np.array([0]))).clips
    drawn = rng.uniforms(3, Stream.FRAME, epoch=2, clip=index.clips["clip_id"][9], frame=np.arange(8))[:, 0]
    free = np.flatnonzero(draws.roles[0].numpy() == 1)
    assert np.allclose(draws.delay[0].numpy()[free], drawn[free])


def test_measured_attention_ratio_agrees_with_the_expected(make_config, make_spec):
    index = ClipIndex.from_arrays(frames=np.full(20000, 12), height=2, width=2)
    for share in (0.5, 1.0):
        config = make_config(token_budget=2000, insertion_share=share)
        steps = all_steps(Plan(index, None, *config, make_spec(), seed=1), 0)
        weights = [step.clips for step in steps]
        measured = np.average([step.attention_ratio for step in steps], weights=weights)
        assert measured == pytest.approx(expected_attention_ratio(config[0], np.full(1, 12)), rel=0.01)


def test_a_quarantined_clip_is_skipped_and_changes_the_fingerprint(index, plan):
    bad = [index.key(3), index.key(500), "unknown"]
    after = plan.with_quarantine(bad)
    assert after.fingerprint != plan.fingerprint
    assert after.with_quarantine(bad).fingerprint == after.fingerprint
    rows = np.concatenate([p.rows for s in all_steps(after, 1) for p in s.packs])
    assert np.array_equal(np.sort(rows), np.delete(np.arange(700), [3, 500]))
    assert after.pack_shape == plan.pack_shape
    shardless = plan.with_quarantine([index.key(row) for row in np.flatnonzero(index.clips["shard"] == 17)])
    order, others = plan._epoch(1)[0], shardless._epoch(1)[0]
    assert np.array_equal(others, order[index.clips["shard"][order] != 17])
    later = after.with_quarantine([index.key(8)])
    assert np.array_equal(later.rows, np.delete(np.arange(700), [3, 8, 500]))


def test_the_fingerprint_covers_what_moves_the_plan_and_nothing_else(index, plan, make_config, make_spec):
    base = {"tasks": {"t2v": 0.5, "i2v": 0.5}}
    same = Plan(index, None, *make_config(**base, insertion_loss_weight=0.7), make_spec(), seed=3)
    assert same.fingerprint == plan.fingerprint
    changed = [
        {"token_budget": 201}, {"packs_per_step": 9}, {"headroom": 0.02}, {"insertion_share": 0.6},
        {"tasks": {"t2v": 1.0}}, {"num_start_frames": 2}, {"delay_law": "full_sequence"}, {"time_block_clips": 16},
        {"tasks": {"t2v": 0.5, "completion": 0.5}}, {"max_context_frames": 3}, {"max_keyframes": 1}, {"max_cuts": 2},
    ]  # fmt: skip
    prints = {Plan(index, None, *make_config(**(base | c)), make_spec(), seed=3).fingerprint for c in changed}
    prints |= {
        Plan(index, None, *make_config(**base), make_spec(), seed=4).fingerprint,
        Plan(index, np.arange(699), *make_config(**base), make_spec(), seed=3).fingerprint,
    }
    assert len(prints) == len(changed) + 2
    assert plan.fingerprint not in prints


def test_the_order_hash_covers_times_roles_and_clips(index, make_config, make_spec):
    # Under full-sequence every frame is visible, so neither time nor task moves a clip to another pack.
    base = {"delay_law": "full_sequence"}
    changes = [{}, {"time_block_clips": 16}, {"tasks": {"i2v": 1.0}}]
    plan, *others = [Plan(index, None, *make_config(**base, **c), make_spec(), seed=3) for c in changes]
    first = plan.step(Cursor())
    for other in others:
        step = other.step(Cursor())
        assert all(np.array_equal(p.rows, q.rows) for p, q in zip(first.packs, step.packs))
        assert other.order_hash(step) != plan.order_hash(first)
    swapped = [replace(first.packs[0], rows=first.packs[0].rows[::-1]), *first.packs[1:]]
    assert plan.order_hash(replace(first, packs=swapped)) != plan.order_hash(first)
    moved = [replace(first.packs[1], number=0), replace(first.packs[0], number=1), *first.packs[2:]]
    assert plan.order_hash(replace(first, packs=moved)) != plan.order_hash(first)


def test_the_order_hash_covers_delays_and_condition_dropout(index, make_config, make_spec, monkeypatch):
    # Delays that move by 1e-9 change the frames' times but hide no frame.
    def plan_of(**keys):
        return Plan(index, None, *make_config(num_start_frames=1, **keys), make_spec(), seed=3)

    pack = plan_of().step(Cursor()).packs[0]
    first = plan_of().pack_digests([pack])
    assert plan_of().pack_digests([pack]) == first
    draws = plan_of().clip_draws(pack).clips
    later = replace(draws, delay=draws.delay + torch.where(draws.roles == 1, 1e-9, 0.0))
    assert torch.equal(later.visible, draws.visible)
    moved = plan_of()
    monkeypatch.setattr(moved._draws, "of_clips", lambda *_: later)
    assert moved.pack_digests([pack]) != first
    behind = replace(draws, delay=torch.where(draws.roles == -1, 5.0, draws.delay))  # no frame of the clip
    monkeypatch.setattr(moved._draws, "of_clips", lambda *_: behind)
    assert moved.pack_digests([pack]) == first
    assert plan_of(condition_dropout=1.0).pack_digests([pack]) != first


def test_the_hash_of_a_pack_at_prescribed_times_is_that_of_those_times(plan):
    pack = plan.step(Cursor()).packs[0]
    own = plan._u_time(pack)
    hashes = [plan.pack_digests([replace(pack, u_time=u)]) for u in (None, own, 0.5 * own)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_conditions_are_kept_by_the_clips_own_uniform(index, plan):
    rows = np.array([5, 60, 300])
    uniforms = rng.uniforms(3, Stream.CONDITION_DROPOUT, epoch=4, clip=index.clips["clip_id"][rows])[:, 0]
    plan.process.condition_dropout = float(np.sort(uniforms)[1])
    kept = plan.clip_draws(PackPlan(4, 0, rows, rows)).keeps_condition
    assert kept.tolist() == (uniforms >= np.median(uniforms)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_steps_of_the_demo_are_full(seed):
    # An epoch's last step may be short: it is skipped, and the 50 steps continue after it.
    root = Path(__file__).parents[2]
    config = load_config([root / "configs" / "demo.yaml"])
    assert (config.plan.token_budget, config.plan.packs_per_step) == (1024, 2)
    frames = np.random.default_rng(seed).choice(list(LENGTH_LAW), 2400, p=list(LENGTH_LAW.values()))
    index = ClipIndex.from_arrays(frames=frames, height=4, width=4)
    assert set(index.tokens_per_frame) == {17}
    rows, _ = index.split(config.data.heldout_fraction)
    plan = Plan(index, rows, config.process, config.plan, config.model.spec(), seed)
    cursor, fill = cursor_at(plan, plan.steps_in_epoch(0) - 20), []
    while len(fill) < 50:
        if plan.next(cursor).epoch == cursor.epoch:
            fill.append(plan.step(cursor).fill)
        cursor = plan.next(cursor)
    assert cursor.epoch == 1
    assert min(fill) >= 0.93


def test_text_counts_only_for_a_network_that_reads_it(make_config, make_spec):
    index = ClipIndex.from_arrays(frames=[2, 3], height=2, width=3, text_tokens=[10, 4])
    silent = Plan(index, None, *make_config(), make_spec(), seed=0)
    assert silent.pack_shape.max_seqlen == 3 * 7
    reading = Plan(index, None, *make_config(), make_spec(text_dim=6), seed=0)
    assert reading.pack_shape.max_seqlen == 3 * 7 + 4
    assert reading.step(Cursor()).tokens == silent.step(Cursor()).tokens + 14
    assert reading.pack_shape.max_frames == 200 // 7


def test_a_dropped_caption_counts_as_the_null_text(make_config, make_spec):
    """A step's tokens with text minus those without: each clip's own caption, or the null text."""
    text = np.arange(40) % 5
    index = ClipIndex.from_arrays(frames=[2] * 40, height=2, width=3, text_tokens=text)
    config = make_config(condition_dropout=0.5, packs_per_step=1, token_budget=2000)
    silent = Plan(index, None, *config, make_spec(), seed=0)
    reading = Plan(index, None, *config, make_spec(text_dim=6), seed=0, null_text_tokens=7)
    for epoch in (0, 1):
        kept = reading.clip_draws(PackPlan(epoch, 0, np.arange(40), np.arange(40))).keeps_condition
        assert 5 < kept.sum() < 35
        expected = sum(int(n) if keep and n else 7 for n, keep in zip(text, kept, strict=True))
        first = Cursor(epoch, 0)
        assert reading.steps_in_epoch(epoch) == 1
        assert reading.step(first).tokens == silent.step(first).tokens + expected
    assert reading.pack_shape.max_seqlen == 2 * 7 + 7
    assert reading.with_quarantine(["clip-000000003"]).null_text_tokens == 7
    assert reading.fingerprint != Plan(index, None, *config, make_spec(text_dim=6), seed=0).fingerprint


def test_bad_input_is_refused_with_what_to_do(index, make_config, make_spec):
    long = ClipIndex.from_arrays(frames=[3, 40], height=2, width=3)
    with pytest.raises(PlanError, match=r"280 tokens.*token_budget=280 or more.*at most 28 latent frames"):
        Plan(long, None, *make_config(), make_spec(), seed=0)
    Plan(long, None, *make_config(token_budget=280), make_spec(), seed=0)
    with pytest.raises(DataError, match="no clips to train on"):
        Plan(ClipIndex.from_arrays(frames=[], height=1, width=1), None, *make_config(), make_spec(), seed=0)
    with pytest.raises(DataError, match="no clips to train on"):
        Plan(index, np.zeros(0, np.int64), *make_config(), make_spec(), seed=0)
    with pytest.raises(ConfigError, match="at least the number of ranks, got 3 and 4 ranks; set packs_per_step=4"):
        check_world_size(3, 4)
    labeled = ClipIndex.from_arrays(frames=[3], height=1, width=1, class_label=3)
    with pytest.raises(PlanError, match="model.num_classes must be at least 4"):
        Plan(labeled, None, *make_config(), make_spec(), seed=0)
    with pytest.raises(ConfigError, match=r"headroom must be a number in \[0, 1\), got 1\.0"):
        Plan(index, None, *make_config(headroom=1.0), make_spec(), seed=0)


def test_there_is_no_step_after_the_last(plan):
    last = Cursor(0, plan.steps_in_epoch(0) - 1)
    assert plan.next(last) == Cursor(1, 0)
    assert plan.next(Cursor(0, 0)) == Cursor(0, 1)
    with pytest.raises(PlanError, match=r"step of epoch 0 must be less than \d+, got \d+"):
        plan.step(Cursor(0, last.step + 1))
    for cursor in (Cursor(0, -1), Cursor(-1, 0)):
        with pytest.raises(PlanError, match="epoch and step must be >= 0"):
            plan.step(cursor)
    assert cursor_at(plan, last.step + 3) == Cursor(1, 2)
    assert Cursor(**json.loads(json.dumps(asdict(last)))) == last


@pytest.mark.parametrize("frames", [[1], [25], [1, 1, 1], [20] * 30])
def test_awkward_sets_are_planned_completely(frames, make_config, make_spec):
    index = ClipIndex.from_arrays(frames=frames, height=1, width=7)
    for packs in (1, 3):
        plan = Plan(index, None, *make_config(packs_per_step=packs), make_spec(), seed=0)
        assert sum(step.clips for step in all_steps(plan, 0)) == len(frames)
        assert all(len(step.packs) == packs for step in all_steps(plan, 0))


def test_two_hundred_thousand_clips_in_segments(make_config, monkeypatch):
    """A large epoch is full, balanced, and complete, and any step is planned without the steps before it."""
    frames = np.random.default_rng(0).integers(4, 20, 200_000)
    index = ClipIndex.from_arrays(frames=frames, height=8, width=8)
    xl = ModelSpec(hidden_size=1152, num_layers=28, num_heads=16, in_channels=128, mlp_hidden_size=3072)
    config = make_config(token_budget=16384, packs_per_step=64, shuffle_block_shards=16)
    plan = Plan(index, None, *config, xl, seed=0)
    steps = plan.steps_in_epoch(0)
    assert plan._epoch(0)[1].num_segments == 3
    full = [plan.step(Cursor(0, step)) for step in range(steps - 1)]
    assert min(step.fill for step in full) >= 0.985
    assert np.mean([step.flops_imbalance for step in full]) <= 0.003
    assert max(step.flops_imbalance for step in full) <= 0.005
    rows = [pack.rows for step in [*full, plan.step(Cursor(0, steps - 1))] for pack in step.packs]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(200_000))

    asked = []
    costs = Plan._costs
    monkeypatch.setattr(Plan, "_costs", lambda self, *a: asked.append(len(a[2])) or costs(self, *a))
    for at in (steps // 2, steps - 3):
        fresh = Plan(index, None, *config, xl, seed=0)
        assert fresh.order_hash(fresh.step(Cursor(0, at))) == plan.order_hash(full[at])
        assert fresh.next(Cursor(0, at)) == Cursor(0, at + 1)
        assert fresh.next(Cursor(0, steps - 1)) == Cursor(1, 0)
        asked.append(-1)
    assert sum(asked[: asked.index(-1)]) > 200_000  # the epoch's end needs all segments
    asked.clear()
    Plan(index, None, *config, xl, seed=0).step(Cursor(0, steps // 2))
    assert sum(asked) < 70_000  # one segment of the three


def test_small_segments_hold_every_clip_once_and_full_steps(make_config, make_spec, monkeypatch):
    monkeypatch.setattr(epoch_module, "SEGMENT_CLIPS", 400)
    random = np.random.default_rng(4)
    index = ClipIndex.from_arrays(frames=random.integers(1, 9, 6000), height=random.integers(1, 4, 6000), width=2)
    plan = Plan(index, None, *make_config(tasks={"t2v": 0.5, "i2v": 0.5}), make_spec(), seed=3)
    assert plan._epoch(0)[1].num_segments > 8
    for epoch in (0, 1):
        steps = all_steps(plan, epoch)
        rows = np.concatenate([pack.rows for step in steps for pack in step.packs])
        assert np.array_equal(np.sort(rows), np.arange(6000))
        assert min(step.fill for step in steps[:-1]) > 0.95
    # A run that starts in the middle and plans the leftover clips step by step gets the same result.
    steps, late = all_steps(plan, 1), Plan(index, None, plan.process, plan.sizes, plan.spec, seed=3)
    late.step(Cursor(1, len(steps) // 2))
    for _ in range(3):
        late.plan_leftovers(1)
    assert late.order_hash(late.step(Cursor(1, len(steps) - 2))) == plan.order_hash(steps[-2])


@pytest.mark.long
@pytest.mark.parametrize(
    "process",
    [
        {"num_start_frames": 1, "insertion_share": 1.0},
        {"num_start_frames": 1, "insertion_share": 1.0, "tasks": {"t2v": 0.5, "completion": 0.5}},
    ],
)
def test_segments_of_clips_of_one_length_do_not_run_short(process, make_config, make_spec):
    """The error of expected tokens then has the same sign for every clip of the set."""
    index = ClipIndex.from_arrays(frames=np.full(140_000, 4), height=8, width=8)
    config = make_config(token_budget=8192, packs_per_step=8, **process)
    _, steps = Plan(index, None, *config, make_spec(), seed=0)._epoch(0)
    assert steps.num_segments == 2
    for segment in range(2):
        steps.plan_segment(segment)
        left = len(steps._left[segment])
        assert 0 < left < 0.03 * 70_000
