"""Remote shards from a real HTTP server on the loopback interface, with injected faults."""

import errno
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowception.data.loader import PackLoader
from flowception.data.plan import Plan
from flowception.errors import ConfigError, DataError
from flowception.files import FileLock
from flowception.shards import remote_cache as remote_module
from flowception.shards.index import INDEX_NAMES
from flowception.shards.open import DataConfig, open_reader, open_set
from flowception.shards.reader import ShardReader
from flowception.shards.remote_cache import CacheConfig, ShardCache
from flowception.shards.remote_reader import RemoteReader
from flowception.shards.schema import ShardMeta
from flowception.shards.writer import ShardSetWriter
from tests.faults.data.http_server import serve
from tests.small_sets import NULL_TEXT_TOKENS

WAITS = pytest.param("stall", marks=pytest.mark.long)
"""A stalled server, where the test waits for the time limit at every attempt."""


@pytest.fixture
def served(make_set, tmp_path, monkeypatch):
    """A server with a set of 6 shards, the set's clips, and a function that opens the set."""
    folder, records = make_set(count=60, text=True)
    monkeypatch.setattr(remote_module, "FIRST_PAUSE_S", 0.01)

    def open_remote(**keys) -> RemoteReader:
        config = CacheConfig(**{"cache_dir": str(tmp_path / "cache"), "timeout_s": 60, "attempts": 3} | keys)
        return open_set(server.url, config)

    with serve(folder) as server:
        yield server, records, open_remote


def time_limit(fault):
    """A short timeout only where a response never comes; other responses may be slow."""
    return {"timeout_s": 2.0} if fault == "stall" else {}


def read_all(reader):
    return [
        (reader.read(row, np.arange(reader.index.clips["frames"][row])), reader.read_text(row)) for row in range(60)
    ]


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_a_remote_set_reads_like_a_local_one_and_each_shard_is_fetched_once(served, make_config, make_spec):
    server, records, open_remote = served
    reader = open_remote()
    for (latents, _), record in zip(read_all(reader), records):
        assert torch.equal(latents, record.latents)
    local = ShardReader(server.folder)
    plan = Plan(
        reader.index,
        None,
        *make_config(packs_per_step=3, token_budget=100),
        make_spec(text_dim=6),
        1,
        null_text_tokens=NULL_TEXT_TOKENS,
    )
    for workers in (0, 2):
        for ours, theirs in zip(
            PackLoader(plan, open_remote(), num_workers=workers), PackLoader(plan, local), strict=True
        ):
            for first, second in zip(ours.packs, theirs.packs, strict=True):
                assert not first.bad_clips
                assert torch.equal(first.noisy, second.noisy)
    assert {name: times for name, times in server.asked.items() if name.endswith("tar")} == {
        f"shard-{number:06d}.tar": 1 for number in range(6)
    }


@pytest.mark.parametrize("fault", ["stall", "reset", "cut", "short", "error"])
def test_a_failed_fetch_is_retried(served, fault):
    server, records, open_remote = served
    server.faults["shard-000001.tar"] = [fault, fault]
    assert torch.equal(open_remote(**time_limit(fault)).read(10, [0]), records[10].latents[:1])
    assert server.asked["shard-000001.tar"] == 3


@pytest.mark.parametrize("fault", [WAITS, "reset", "cut", "short", "error"])
def test_a_permanently_failed_fetch_is_named_and_not_retried_at_every_clip(served, fault):
    server, records, open_remote = served
    server.faults["shard-000001.tar"] = [fault] * 100
    reader = open_remote(**time_limit(fault))
    for row in (10, 11, 12):
        with pytest.raises(DataError, match=r"cannot fetch .*127.0.0.1.*shard-000001.tar after 3 attempts"):
            reader.read(row, [0])
    assert server.asked["shard-000001.tar"] == 3
    assert torch.equal(reader.read(9, [0]), records[9].latents[:1])
    assert not list(reader.folder.glob("*shard-000001.tar*partial"))


def test_clips_of_an_unreachable_shard_are_quarantined_the_same_way_after_a_resume(served, make_config, make_spec):
    server, _, open_remote = served
    server.faults["shard-000002.tar"] = ["reset"] * 1000
    reader = open_remote()
    plan = Plan(
        reader.index,
        None,
        *make_config(packs_per_step=3, token_budget=100),
        make_spec(text_dim=6),
        1,
        null_text_tokens=NULL_TEXT_TOKENS,
    )
    batches = list(PackLoader(plan, reader))
    bad = {clip.key for batch in batches for clip in batch.quarantined}
    assert bad == {f"clip_{number:03d}" for number in range(20, 30)}
    resumed = list(PackLoader(plan, open_remote(), cursor=batches[1].next_cursor))
    for first, second in zip(batches[2:], resumed, strict=True):
        assert [b.key for b in first.quarantined] == [b.key for b in second.quarantined]
        assert all(torch.equal(p.noisy, q.noisy) for p, q in zip(first.packs, second.packs))


def test_a_missing_remote_shard_is_named_at_once(served):
    server, _, open_remote = served
    reader = open_remote()
    (server.folder / "shard-000003.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000003.tar after 1 attempt \(not found\)"):
        reader.read(30, [0])


def test_a_byte_flipped_in_transit_is_detected(served):
    server, records, open_remote = served
    path = server.folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    at = int(ShardReader(server.folder).index.clips["latents_offset"][3])
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"clip {records[3].key} in .*latent frame 0 does not match"):
        open_remote().read(3, [0])
    assert server.asked["shard-000000.tar"] == 2  # fetched again, as the cached copy could have been damaged


def test_a_damaged_copy_is_fetched_again(served):
    server, records, open_remote = served
    readers = [open_remote(), open_remote()]
    for reader in readers:
        reader.read(4, [0])
    copy = readers[0].folder / "shard-000000.tar"
    with copy.open("r+b") as file:
        file.seek(int(readers[0].index.clips["latents_offset"][3]))
        file.write(b"\x55" * 64)
    for reader in readers:
        assert torch.equal(reader.read(3, [0]), records[3].latents[:1])
    assert server.asked["shard-000000.tar"] == 2


def test_a_set_encoded_again_at_the_same_url_is_fetched_again(served):
    server, records, open_remote = served
    assert torch.equal(open_remote().read(0, [0]), records[0].latents[:1])
    sizes = {path.name: path.stat().st_size for path in server.folder.glob("*.tar")}
    meta = ShardMeta.load(server.folder)
    for path in server.folder.iterdir():
        path.unlink()
    writer = ShardSetWriter(server.folder, meta)
    for shard in range(6):
        part = records[10 * shard : 10 * shard + 10]
        writer.write_shard(shard, [replace(each, latents=each.latents + 1) for each in part])
    writer.finish()
    assert {path.name: path.stat().st_size for path in server.folder.glob("*.tar")} == sizes
    again = open_remote()
    assert torch.equal(again.read(0, [0]), records[0].latents[:1] + 1)
    assert server.asked["shard-000000.tar"] == 2
    assert not list(again.folder.glob("*.dropped"))


def test_the_cache_stays_within_its_size_and_keeps_open_shards(served):
    server, records, open_remote = served
    largest = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    reader = open_remote(cache_gb=3.2 * largest / 1e9)
    reader.max_open_shards = 2
    for row in (0, 10, 20, 30, 40, 50, 0):
        assert torch.equal(reader.read(row, [0]), records[row].latents[:1])
        held = sum(path.stat().st_size for path in reader.folder.glob("*.tar"))
        assert held <= 3.2 * largest
    assert server.asked["shard-000000.tar"] == 2  # least recently used, so deleted, then fetched again
    small = open_remote(cache_gb=3.2 * largest / 1e9)
    small.max_open_shards = 10
    with pytest.raises(ConfigError, match="full of shards in use.*raise data.cache.cache_gb"):
        read_all(small)


def test_partial_shards_count_and_those_of_killed_processes_are_deleted(served):
    server, records, open_remote = served
    largest = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    reader = open_remote(cache_gb=2.5 * largest / 1e9)
    stale, current = (reader.folder / f".shard-00000{number}.tar.partial" for number in (4, 5))
    stale.write_bytes(bytes(largest))
    current.write_bytes(bytes(largest))
    with FileLock(reader.folder / ".shard-000005.tar.lock", DataError):
        assert torch.equal(reader.read(0, [0]), records[0].latents[:1])
        assert current.exists()
        assert not stale.exists()
        with pytest.raises(ConfigError, match="full of shards in use"):
            reader.read(10, [0])
    assert torch.equal(reader.read(10, [0]), records[10].latents[:1])
    assert not current.exists()


def test_a_full_local_disk_is_named_and_does_not_end_prefetching(served, monkeypatch):
    server, records, open_remote = served
    reader = open_remote()
    remote = reader.cache._remote()
    real, tried = remote.get_file, threading.Event()

    def disk_full(source, target):
        if "shard-000001" in source:
            tried.set()
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(remote, "get_file", disk_full)
    with pytest.raises(ConfigError, match=r"disk error in the cache .*cache \(No space left on device\); free"):
        reader.read(10, [0])
    assert not list(reader.folder.glob(".shard*.partial"))
    tried.clear()
    reader.prefetch(np.array([10]))
    assert tried.wait(60)
    reader.prefetch(np.array([20]))
    wait_for(reader.folder / "shard-000002.tar")


def test_a_shard_deleted_while_it_is_open_still_reads(served):
    _, records, open_remote = served
    reader = open_remote()
    reader.read(0, [0])
    (reader.folder / "shard-000000.tar").unlink()
    assert torch.equal(reader.read(1, [0]), records[1].latents[:1])


def _fetch(url, config, name, size):
    ShardCache(url, config).fetch(name, size)


def test_processes_of_a_node_fetch_a_shard_once(served, tmp_path):
    server, _, open_remote = served
    reader = open_remote()
    size = reader.meta.shards[4].size_bytes
    spawn = multiprocessing.get_context("spawn")
    arguments = (server.url, reader.cache.config, "shard-000004.tar", size)
    processes = [spawn.Process(target=_fetch, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert server.asked["shard-000004.tar"] == 1


def _open(url, config, barrier):
    barrier.wait(600)
    reader = RemoteReader(url, config)
    assert len(reader.index) == 60
    reader.read(0, [0])


def open_in_processes(url, config, count):
    """Processes that all start before the first opens the set, like the ranks of a node."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(count)
    processes = [spawn.Process(target=_open, args=(url, config, barrier)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def test_processes_of_a_node_fetch_description_and_index_once(served, tmp_path, monkeypatch):
    server, _, open_remote = served
    config = CacheConfig(cache_dir=str(tmp_path / "cache"), timeout_s=60)
    open_in_processes(server.url, config, 3)
    once = {"meta.json": 1, **dict.fromkeys(INDEX_NAMES, 1), "shard-000000.tar": 1}
    assert server.asked == once
    monkeypatch.setattr(remote_module, "_STARTED", time.time())  # as in another run, which fetches meta.json again
    open_remote()
    assert server.asked == once | {"meta.json": 2}


def test_a_process_never_reads_the_same_copy_of_the_description_twice(served):
    server, _, open_remote = served
    for times in (1, 2, 3):
        open_remote()
        assert server.asked == {"meta.json": times, **dict.fromkeys(INDEX_NAMES, 1)}


def test_a_description_whose_fetch_started_before_this_process_is_fetched_again(served, monkeypatch):
    server, _, open_remote = served
    path = ShardCache(server.url, open_remote().cache.config).folder / "meta.json"
    for since, asked in ((path.stat().st_mtime, 1), (path.stat().st_mtime + 1e-3, 2)):
        monkeypatch.setattr(remote_module, "_last_read", {})
        monkeypatch.setattr(remote_module, "_STARTED", since)
        open_remote()
        assert server.asked["meta.json"] == asked


@pytest.mark.parametrize("name", INDEX_NAMES)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_copy_of_the_index_is_fetched_again(served, name, damage):
    server, records, open_remote = served
    path = open_remote().folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:100] if damage == "cut" else content)
    for _ in range(2):
        assert torch.equal(open_remote().read(3, [0]), records[3].latents[:1])
    assert [server.asked[each] for each in INDEX_NAMES] == [2] * 3


@pytest.mark.parametrize("fault", [WAITS, "reset", "missing"])
def test_waiting_for_a_failed_fetch_fails_with_the_same_error(served, fault):
    server, _, open_remote = served
    reader = open_remote(**time_limit(fault))
    name, size = "shard-000004.tar", reader.meta.shards[4].size_bytes
    server.faults[name] = [fault] * 100
    if fault == "missing":
        (server.folder / name).unlink()
    caches = [ShardCache(server.url, reader.cache.config) for _ in range(4)]
    with ThreadPoolExecutor(len(caches)) as pool:
        reasons = {str(fetch.exception()) for fetch in [pool.submit(cache.fetch, name, size) for cache in caches]}
    (reason,) = reasons
    assert "shard-000004.tar after" in reason
    attempts = 1 if fault == "missing" else 3
    assert server.asked[name] == attempts
    if fault == "missing":
        with pytest.raises(DataError, match="not found"):  # a restarted run requests it again
            ShardCache(server.url, reader.cache.config).fetch(name, size)
        assert server.asked[name] == 2


def test_a_failure_is_forgotten_after_a_while_and_after_a_success(served, monkeypatch):
    server, records, open_remote = served
    reader = open_remote()
    server.faults["shard-000004.tar"] = ["reset"] * 3
    with pytest.raises(DataError, match="after 3 attempts"):
        reader.read(40, [0])
    now = time.time()
    # Longer than the worst case of all attempts: 3 times connecting and reading, 30 s each, plus the pauses.
    monkeypatch.setattr(remote_module.time, "time", lambda: now + 180)
    with pytest.raises(DataError, match="after 3 attempts"):
        reader.read(40, [0])
    assert server.asked["shard-000004.tar"] == 3
    monkeypatch.setattr(remote_module.time, "time", lambda: now + 3600)
    assert torch.equal(reader.read(40, [0]), records[40].latents[:1])
    assert not list(reader.folder.glob("*.failed"))


def test_shards_are_fetched_before_they_are_needed(served):
    server, _, open_remote = served
    reader = open_remote()
    reader.prefetch(np.array([20, 55]))
    for number in (2, 5):
        wait_for(reader.folder / f"shard-00000{number}.tar")
    assert set(server.asked) >= {"shard-000002.tar", "shard-000005.tar"}
    assert server.asked["shard-000000.tar"] == 0


def test_a_changed_remote_index_is_refused(served):
    server, _, open_remote = served
    path = server.folder / "index-clips.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="does not match meta.json"):
        open_remote()
    assert server.asked["index-clips.npy"] == 2  # the cached copy could have been damaged


def test_errors_name_what_cannot_be_opened(served, tmp_path):
    server, _, open_remote = served
    (server.folder / "meta.json").unlink()
    with pytest.raises(DataError, match=r"cannot fetch .*set/meta.json after 1 attempt "):
        open_remote()
    with pytest.raises(ConfigError, match="data.cache.cache_gb must be a number > 0, got 0"):
        CacheConfig(cache_gb=0)
    with pytest.raises(ConfigError, match="cannot open data.path="):
        open_reader(DataConfig(path="nosuch://set", cache=CacheConfig(cache_dir=str(tmp_path / "d"))))
