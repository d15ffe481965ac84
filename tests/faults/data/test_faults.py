"""Every row of the fault table, and an encoder that is killed or runs out of disk at every write."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from flowception.errors import DataError
from flowception.shards import writer as shards_module
from flowception.shards.writer import ShardSetWriter
from tests.faults.data.faults import FAULTS
from tests.faults.data.scene import META, Scene, happens

pytestmark = pytest.mark.long


def test_the_table_has_at_least_thirty_distinct_rows():
    assert len({entry.name for entry in FAULTS}) == len(FAULTS) >= 30


@pytest.mark.parametrize("entry", FAULTS, ids=lambda entry: entry.name)
def test_a_fault_is_detected_and_named(entry, tmp_path):
    assert happens(entry, tmp_path)


def _in_child(work) -> int:
    """Run ``work`` in a forked process and return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _encode(folder, records) -> None:
    writer = ShardSetWriter(folder, META)
    for shard in range(3):
        if not writer.is_finished(shard):
            writer.write_shard(shard, records[10 * shard : 10 * shard + 10])
    writer.finish()


def _files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_set_is_identical_after_its_encoder_was_killed_at_any_write(tmp_path):
    """SIGKILL hits before the n-th visible action (writing a clip, a sync, a rename), for every n."""
    scene = Scene(tmp_path)
    expected, kills = _files(scene.folder), 0
    for dies_at in range(10_000):
        folder, acts = tmp_path / f"set-{dies_at}", [0]

        def counted(act, acts=acts, dies_at=dies_at):
            def done(*arguments, **keys):
                if acts[0] == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                acts[0] += 1
                return act(*arguments, **keys)

            return done

        def work(folder=folder, counted=counted):
            shards_module._ShardWriter.write = counted(shards_module._ShardWriter.write)
            os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
            _encode(folder, scene.records)
            os._exit(0)

        status = _in_child(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert not (folder / "meta.json").exists() or _files(folder) == expected
        _encode(folder, scene.records)
        assert _files(folder) == expected
    assert kills >= 30 + 3 * 4


def test_an_encoder_reports_a_full_disk_and_continues_once_there_is_space(tmp_path):
    """The kernel refuses to let a file grow. EFBIG stands in for ENOSPC, which would need a full disk."""
    scene = Scene(tmp_path)
    expected, size = _files(scene.folder), (scene.folder / "shard-000001.tar").stat().st_size
    for limit in (0, 100, 512, size // 2, size - 1):
        folder = tmp_path / f"set-{limit}"

        def work(folder=folder, limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                _encode(folder, scene.records)
            except DataError as error:
                named = str(error).startswith(f"cannot write {folder}") and " (File too large); free" in str(error)
                os._exit(3 if named and error.__cause__.errno == errno.EFBIG else 4)

        assert _in_child(work) == 3
        assert not (folder / "meta.json").exists()
        _encode(folder, scene.records)
        assert _files(folder) == expected
