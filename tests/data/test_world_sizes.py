"""A run's data does not depend on the numbers of ranks and workers, or on where it was stopped."""

import threading

import numpy as np
import pytest

from flowception.data.loader import PackLoader
from flowception.data.plan import Plan
from flowception.data.prefetch import steps_ahead
from flowception.data.step_plan import Cursor, combine_digests
from flowception.errors import PlanError
from flowception.shards.reader import ShardReader
from tests.small_sets import write_small_set

WORLD_SIZES = (1, 2, 3, 4, 8, 16, 64)


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_config, make_spec):
    folder = tmp_path_factory.mktemp("world")
    write_small_set(folder, count=400, per_shard=50)
    reader = ShardReader(folder)
    return Plan(reader.index, None, *make_config(packs_per_step=64, token_budget=80), make_spec(), 1), reader


def loaders(plan, reader, world_size, cursor, num_workers=0):
    return [iter(PackLoader(plan, reader, rank, world_size, cursor, num_workers)) for rank in range(world_size)]


def next_step(plan, running):
    """Hash of the next step, from the packs of each rank, and the cursor after it."""
    batches = [next(rank) for rank in running]
    digests, keys = {}, {}
    for rank, batch in enumerate(batches):
        numbers = range(rank, len(batch.step_plan.packs), len(batches))
        for number, pack in zip(numbers, batch.packs):
            planned = batch.step_plan.packs[number]
            keys[number] = pack.keys
            digests[number] = plan.pack_digests([planned])[0]
            assert pack.keys == tuple(plan.index.key(row) for row in planned.rows)
    found = combine_digests([digests[number] for number in sorted(digests)])
    assert found == plan.order_hash(batches[0].step_plan)
    (cursor,) = {batch.next_cursor for batch in batches}
    return (found, tuple(keys[number] for number in sorted(keys))), cursor


@pytest.fixture(scope="module")
def expected(world):
    """Every step of two epochs in one process, by cursor."""
    plan, reader = world
    steps, cursor = {}, Cursor()
    while cursor.epoch < 2:
        running = loaders(plan, reader, 1, cursor)
        for _ in range(plan.steps_in_epoch(cursor.epoch)):
            at = cursor
            steps[at], cursor = next_step(plan, running)
    assert len(steps) >= 6
    return steps


@pytest.mark.long
def test_every_world_size_sees_the_same_from_any_cursor(world, expected):
    plan, reader = world
    cursors = list(expected)
    for world_size in WORLD_SIZES:
        for start in (cursors[1], cursors[len(cursors) // 2], cursors[-1]):
            fresh = Plan(reader.index, None, plan.process, plan.sizes, plan.spec, 1)
            found, _ = next_step(plan, loaders(fresh, reader, world_size, start))
            assert found == expected[start]


def test_any_sequence_of_world_sizes_sees_every_step_once(world, expected):
    plan, reader = world
    random, cursor, seen = np.random.default_rng(0), Cursor(), []
    while cursor.epoch < 2:
        fresh = Plan(reader.index, None, plan.process, plan.sizes, plan.spec, 1)
        running = loaders(fresh, reader, int(random.choice(WORLD_SIZES)), cursor)
        epoch, left = cursor.epoch, int(random.integers(1, 4))
        while left and cursor.epoch == epoch:
            seen.append(cursor)
            found, cursor = next_step(plan, running)
            assert found == expected[seen[-1]]
            left -= 1
    assert seen == list(expected)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_change_nothing_and_the_cursor_is_that_of_the_returned_step(world, expected, num_workers):
    plan, reader = world
    (running,) = loaders(plan, reader, 1, Cursor(), num_workers)
    for number, at in enumerate(cursor for cursor in expected if cursor.epoch == 0):
        batch = next(running)
        assert batch.cursor == at  # however many steps the workers are ahead
        assert batch.next_cursor == plan.next(at)
        assert tuple(pack.keys for pack in batch.packs) == expected[at][1]
        if number == 1:
            resumed, _ = next_step(plan, loaders(plan, reader, 2, batch.next_cursor))
            assert resumed == expected[batch.next_cursor]


def test_an_error_while_planning_ahead_is_raised_in_the_loader(world, monkeypatch):
    plan, reader = world
    real = Plan.step

    def broken(self, cursor):
        if cursor.step == 2:
            raise PlanError("no such plan")
        return real(self, cursor)

    monkeypatch.setattr(Plan, "step", broken)
    running = iter(PackLoader(plan, reader))
    assert [next(running).cursor.step for _ in range(2)] == [0, 1]
    with pytest.raises(PlanError, match="no such plan"):
        next(running)


def test_planning_ahead_ends_when_iteration_ends(world):
    plan, _ = world
    before = set(threading.enumerate())  # loaders of other tests may still be planning
    ahead = steps_ahead(plan, Cursor(), 1)
    next(ahead)
    (thread,) = [t for t in threading.enumerate() if t.name == "plan ahead" and t not in before]
    ahead.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
