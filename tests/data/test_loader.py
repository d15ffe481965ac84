import dataclasses
import multiprocessing
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch

from flowception.data.loader import PackLoader, packs_of_rank
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor
from flowception.errors import ConfigError
from flowception.shards.open import DataConfig
from flowception.shards.reader import ShardReader


@pytest.fixture
def world(make_set, make_config, make_spec):
    folder, _ = make_set(count=60)
    reader = ShardReader(folder)
    return Plan(reader.index, None, *make_config(packs_per_step=3, token_budget=100), make_spec(), 1), reader


def tensors(batch):
    """Every tensor of a batch, by name."""
    found = {}
    for number, pack in enumerate(batch.packs):
        for part in (pack, pack.layout):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if isinstance(value, torch.Tensor):
                    found[f"{number}.{type(part).__name__}.{field.name}"] = value
    return found


def order(batch):
    """Clips and places of a step's packs, which determine all other draws of the plan."""
    return [(pack.epoch, pack.number, pack.rows.tolist(), pack.places.tolist()) for pack in batch.step_plan.packs]


def assert_equal(first, second):
    assert (first.cursor, first.next_cursor) == (second.cursor, second.next_cursor)
    assert order(first) == order(second)
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_from_a_cursor_equals_continuing(world, num_workers):
    plan, reader = world
    whole = [*PackLoader(plan, reader), *PackLoader(plan, reader, cursor=Cursor(1, 0))]
    steps = plan.steps_in_epoch(0)
    assert steps >= 4
    assert whole[-1].next_cursor == Cursor(2, 0)
    for at in (0, steps - 1, steps + 2) if num_workers else range(len(whole)):
        again = Plan(reader.index, None, plan.process, plan.sizes, plan.spec, 1)
        cursor = whole[at - 1].next_cursor if at else None
        rest = list(PackLoader(again, ShardReader(reader.folder), cursor=cursor, num_workers=num_workers))
        expected = [b for b in whole[at:] if b.cursor.epoch == whole[at].cursor.epoch]
        assert len(rest) == len(expected)
        for first, second in zip(rest, expected):
            assert_equal(first, second)


def test_loading_does_not_change_torch_random_state(world):
    plan, reader = world
    before = torch.get_rng_state()
    next(iter(PackLoader(plan, reader)))
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_share_a_step_and_get_padding_where_packs_run_out(world):
    plan, reader = world
    whole = next(iter(PackLoader(plan, reader)))
    first, second = (next(iter(PackLoader(plan, reader, rank=r, world_size=2))) for r in (0, 1))
    assert [len(b.packs) for b in (whole, first, second)] == [3, 2, 2]
    for ours, theirs in ((first.packs[0], 0), (second.packs[0], 1), (first.packs[1], 2)):
        assert torch.equal(ours.noisy, whole.packs[theirs].noisy)
        assert ours.keys == whole.packs[theirs].keys
    assert second.packs[1].keys == ()


def test_micro_steps_of_a_small_example():
    packs = list("abcdefg")
    assert packs_of_rank(packs, 0, 3) == ["a", "d", "g"]
    assert packs_of_rank(packs, 2, 3) == ["c", "f", None]
    assert packs_of_rank(packs, 0, 1) == packs


def test_more_ranks_than_packs_are_refused(world):
    plan, reader = world
    with pytest.raises(ConfigError, match="packs_per_step must be at least the number of ranks, got 3 and 4 ranks"):
        PackLoader(plan, reader, rank=0, world_size=4)
    with pytest.raises(ConfigError, match="rank must be an integer from 0 to 2, got 3"):
        PackLoader(plan, reader, rank=3, world_size=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_clips_are_listed_with_what_they_cost(world, num_workers):
    plan, reader = world
    (reader.folder / "shard-000002.tar").write_bytes(b"")
    batches = list(PackLoader(plan, reader, num_workers=num_workers))
    listed = [bad for batch in batches for bad in batch.quarantined]
    assert sorted(bad.key for bad in listed) == [f"clip_{i:03d}" for i in range(20, 30)]
    assert all("shard-000002.tar: the shard is truncated at byte" in bad.reason for bad in listed)
    after = plan.with_quarantine(bad.key for bad in listed)
    assert not [bad for batch in PackLoader(after, reader, cursor=Cursor(1, 0)) for bad in batch.quarantined]
    for batch in batches:
        kept = sum(int((pack.weight_token > 0).sum()) for pack in batch.packs)
        assert kept + sum(bad.tokens for bad in batch.quarantined) == batch.step_plan.tokens


def test_settings_out_of_range_are_refused():
    for keys in ({"heldout_fraction": 1.0}, {"num_workers": -1}, {"prefetch_steps": 0}, {"max_bad_clips": -1}):
        with pytest.raises(ConfigError, match=f"^data.{next(iter(keys))} must be .*, got {next(iter(keys.values()))}$"):
            DataConfig(path="x", **keys)


def test_many_packs_per_step_need_few_file_descriptors(make_set, make_config, make_spec):
    """A step of 40 packs has about a thousand tensors, so one descriptor per tensor would exceed the limit."""
    folder, _ = make_set(count=60)
    reader = ShardReader(folder)
    plan = Plan(reader.index, None, *make_config(packs_per_step=40, token_budget=100), make_spec(), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 100, hard))
    try:
        (batch,) = PackLoader(plan, reader, num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(batch.packs) == 40
    assert len(tensors(batch)) > 256
    blocks = {tensor.untyped_storage().data_ptr() for tensor in tensors(batch).values()}
    assert len(blocks) == 1


def test_packs_of_killed_workers_leave_nothing_in_shared_memory(world):
    """Their shared memory no longer has a name; /proc shows the mapped file as deleted."""
    plan, reader = world
    batches = iter(PackLoader(plan, reader, num_workers=1))
    batch = next(batches)
    block = batch.packs[0].noisy.untyped_storage().data_ptr()
    with open("/proc/self/maps") as file:
        mapped = [line.split(maxsplit=5) for line in file]
    (name,) = [
        parts[5].strip()
        for parts in mapped
        if len(parts) == 6 and int(parts[0].split("-")[0], 16) <= block < int(parts[0].split("-")[1], 16)
    ]
    assert name.startswith("/dev/shm/torch_")
    assert name.endswith("(deleted)")
    assert len(list(batches)) == plan.steps_in_epoch(0) - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_packs_are_in_page_locked_memory_with_a_gpu(world, num_workers):
    plan, reader = world
    for name, tensor in tensors(next(iter(PackLoader(plan, reader, num_workers=num_workers)))).items():
        assert tensor.is_pinned(), name


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skipped_clips_become_padding_in_place_and_are_listed(world, num_workers):
    plan, reader = world
    keys = {plan.index.key(row): "skipped" for row in (3, 30)}
    whole = list(PackLoader(plan, reader))
    found = list(PackLoader(plan, reader, num_workers=num_workers, skipped=keys))
    assert sorted(bad.key for batch in found for bad in batch.quarantined) == sorted(keys)
    for ours, theirs in zip(found, whole, strict=True):
        assert order(ours) == order(theirs)
        assert [pack.keys for pack in ours.packs] == [pack.keys for pack in theirs.packs]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_waiting_for_names_the_clips_of_the_next_batch(world, num_workers, tmp_path):
    """The reader blocks in the second step until the file appears; meanwhile another thread calls ``waiting_for``."""
    plan, reader = world
    rows = np.concatenate([pack.rows for pack in plan.step(Cursor(0, 1)).packs])
    loader = PackLoader(plan, Slow(reader.folder, set(rows.tolist()), tmp_path), num_workers=num_workers, prefetch=1)
    assert loader.waiting_for() == "the plan for the next step"
    batches = iter(loader)
    assert next(batches).cursor == Cursor(0, 0)
    waiter = threading.Thread(target=next, args=(batches,))
    waiter.start()
    while not (tmp_path / "waits").exists():
        time.sleep(0.01)
    said = loader.waiting_for()
    (tmp_path / "go").touch()
    waiter.join()
    named = ", ".join(reader.describe(int(row)) for row in rows[:3])
    worker = ", read by worker 0" if num_workers else ""
    assert said == f"step 1 of epoch 0: {named} and {len(rows) - 3} more{worker}"
    assert f"{reader.folder}/shard-" in said


class Slow(ShardReader):
    def __init__(self, folder, rows, signals):
        super().__init__(folder)
        self.rows, self.signals = rows, signals

    def read_clip(self, row, frames):
        if row in self.rows:
            (self.signals / "waits").touch()
            while not (self.signals / "go").exists():
                time.sleep(0.01)
        return super().read_clip(row, frames)


def test_workers_ignore_the_signals_that_stop_a_run(world):
    """Slurm sends them to every process of a task, and the current step needs its workers."""
    plan, reader = world
    before = set(multiprocessing.active_children())
    batches = iter(PackLoader(plan, reader, num_workers=2, prefetch=1))
    found = [next(batches), next(batches)]  # one from each worker, so both have started
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    found += batches
    assert [batch.cursor.step for batch in found] == list(range(plan.steps_in_epoch(0)))
