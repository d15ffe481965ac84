import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from flowception.checkpoint import writer
from flowception.checkpoint.format import checkpoint_dir, list_steps
from flowception.checkpoint.reader import hashes, latest_valid, verify
from flowception.errors import CheckpointError


def begin(run_dir, step, attempt="test"):
    return writer.make(writer.attempt_dir(run_dir, step, attempt))


class Clock:
    """A clock that advances only while waiting and calls ``then`` at the given second."""

    def __init__(self, at_s=0.0, then=lambda: None):
        self.now_s, self.at_s, self.then = 0.0, at_s, then

    def __call__(self):
        return self.now_s

    def pause(self, seconds):
        before_s, self.now_s = self.now_s, self.now_s + seconds
        if before_s < self.at_s <= self.now_s:
            self.then()


def wait(folder, writers, clock, timeout_s=60.0):
    return writer.wait_for_receipts(folder, writers, lambda: timeout_s, clock_s=clock, pause=clock.pause)


def test_waits_for_receipts(tmp_path):
    folder = begin(tmp_path, 5)
    writer.write_slices(folder, 1, {}, {})
    clock = Clock(at_s=40, then=lambda: writer.write_slices(folder, 0, {}, {}))
    assert [r["file"] for r in wait(folder, 2, clock)] == ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert clock.now_s == pytest.approx(40, abs=0.1)


def test_a_writer_that_does_not_finish_in_time_is_named_and_nothing_appears(tmp_path):
    folder = begin(tmp_path, 5)
    writer.write_slices(folder, 0, {}, {})
    (folder / "rank_00001.safetensors").write_bytes(b"half")
    (folder / "rank_00001.receipt.partial").write_text("{")
    clock = Clock()
    with pytest.raises(CheckpointError, match=r"ranks 1, 2 did not finish within 60 s"):
        wait(folder, 3, clock)
    assert clock.now_s == pytest.approx(60, abs=0.2)
    assert list_steps(tmp_path) == []
    assert latest_valid(tmp_path) is None


def test_the_time_limit_can_change_while_waiting(tmp_path):
    clock = Clock()

    def limit_s():
        return 1000 if clock.now_s < 20 else 3

    with pytest.raises(CheckpointError, match="within 3 s"):
        writer.wait_for_receipts(begin(tmp_path, 5), 1, limit_s, clock_s=clock, pause=clock.pause)
    assert clock.now_s == pytest.approx(20, abs=0.1)


def test_a_writer_that_failed_is_quoted_when_the_others_are_done(tmp_path):
    folder = begin(tmp_path, 5)
    writer.write_slices(folder, 1, {}, {})
    writer.write_failure(folder, 1, "[Errno 28] No space left on device")
    assert not (folder / "rank_00001.safetensors").exists(), "it holds room that others may need"
    clock = Clock(at_s=5, then=lambda: writer.write_slices(folder, 0, {}, {}))
    with pytest.raises(CheckpointError, match="^rank 1: .* No space left on device$"):
        wait(folder, 2, clock)
    assert clock.now_s >= 5


def test_attempts_are_never_mixed(tmp_path, part):
    """A killed job left a complete part of rank 1 for step 4; rank 1 of the next job never writes its part."""
    left_over = begin(tmp_path, 4, "killed-1")
    for rank in (0, 1):
        writer.write_slices(left_over, rank, *part(rank, 2))
    folder = begin(tmp_path, 4, "next-1")
    assert folder != left_over
    writer.write_slices(folder, 0, *part(0, 2))
    with pytest.raises(CheckpointError, match="rank 1 did not finish"):
        wait(folder, 2, Clock())


def test_leftovers_are_not_checkpoints_and_are_removed(tmp_path, save):
    save(tmp_path, 2)
    for step, attempt in ((2, "pruned"), (2, "a-1"), (4, "a-2"), (4, "replaced")):
        writer.write_slices(begin(tmp_path, step, attempt), 0, {}, {})
    assert latest_valid(tmp_path) == checkpoint_dir(tmp_path, 2)
    shutil.rmtree(writer.attempt_dir(tmp_path, 4, "replaced"))
    writer.remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    writer.remove_leftovers(tmp_path / "new run")


def test_a_commit_needs_the_files_of_the_receipts(tmp_path, part):
    folder = begin(tmp_path, 4)
    for rank in (0, 1):
        writer.write_slices(folder, rank, *part(rank, 2))
    receipts = wait(folder, 2, Clock())
    with pytest.raises(CheckpointError, match="gap or overlap|cover"):
        writer.commit(folder, 4, receipts[:1], {})
    path = folder / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        writer.commit(folder, 4, receipts, {})
    assert list_steps(tmp_path) == []


class Killed(BaseException):
    """Simulates the end of the process; not caught by our code."""


class Operations:
    """Counts file operations, and ends the process before one of them."""

    NAMES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")

    def __init__(self, monkeypatch, kill_at=None):
        self.kill_at, self.done = kill_at, []
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.before(name, getattr(os, name)))
        monkeypatch.setattr(writer, "save_file", self.before("save_file", writer.save_file))
        monkeypatch.setattr(Path, "write_text", self.before("write_text", Path.write_text))

    def before(self, name, call):
        def watched(*arguments, **named):
            if len(self.done) == self.kill_at:
                raise Killed(name)
            self.done.append(name)
            return call(*arguments, **named)

        return watched


def save_over(run_dir, part):
    """Save step 4 again, then step 6, then prune."""
    for step in (4, 6):
        folder = begin(run_dir, step)
        for rank in (0, 1):
            writer.write_slices(folder, rank, *part(rank, 2))
        writer.commit(folder, step, writer.wait_for_receipts(folder, 2, lambda: 0), {"optimizer_steps": step})
        writer.prune(run_dir, step, keep_last=2)


def test_after_a_kill_at_any_operation_nothing_is_lost_and_the_next_job_continues(tmp_path, save, part, monkeypatch):
    for step in (0, 2, 4):
        save(tmp_path / "before", step)
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    with monkeypatch.context() as patch:
        whole = Operations(patch)
        save_over(tmp_path / "whole", part)
    assert {"mkdir", "rename", "unlink", "rmdir", "fsync", "save_file", "write_text"} <= set(whole.done)
    expected = {step: hashes(checkpoint_dir(tmp_path / "whole", step)) for step in (4, 6)}
    newest = set()
    for number in range(len(whole.done)):
        run_dir = tmp_path / f"killed-{number}"
        shutil.copytree(tmp_path / "before", run_dir)
        with monkeypatch.context() as patch:
            Operations(patch, kill_at=number)
            with pytest.raises(Killed):
                save_over(run_dir, part)
        writer.remove_leftovers(run_dir)
        found = latest_valid(run_dir)
        newest.add(found.name)
        assert hashes(found) == expected[int(found.name[5:])]
        for step in list_steps(run_dir):
            verify(checkpoint_dir(run_dir, step))
        assert len(list_steps(run_dir)) >= 3
        assert not list((run_dir / "checkpoints").glob("*.tmp"))
        save_over(run_dir, part)
        assert list_steps(run_dir) == [0, 4, 6]
        assert hashes(latest_valid(run_dir)) == expected[6]
        shutil.rmtree(run_dir)
    assert newest == {"step_00000004", "step_00000006"}


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path, save):
    first = hashes(save(tmp_path, 3))
    (checkpoint_dir(tmp_path, 3) / "rank_00000.safetensors").write_bytes(b"")
    assert hashes(save(tmp_path, 3)) == first
    verify(checkpoint_dir(tmp_path, 3))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (2, None, [0, 8, 10]),
        (None, None, [0, 2, 4, 6, 8, 10]),
        (2, 4, [0, 4, 8, 10]),
        (9, None, [0, 2, 4, 6, 8, 10]),
    ],
)
def test_prune_keeps_the_newest_and_step_0(tmp_path, save, keep_last, keep_every, left):
    for step in range(0, 12, 2):
        save(tmp_path, step, writers=1)
    removed = writer.prune(tmp_path, 10, keep_last, keep_every)
    assert list_steps(tmp_path) == left
    assert sorted(removed + left) == [0, 2, 4, 6, 8, 10]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_nothing_is_pruned_after_an_incomplete_checkpoint(tmp_path, save):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    path = checkpoint_dir(tmp_path, 8) / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        writer.prune(tmp_path, 8, keep_last=2)
    assert list_steps(tmp_path) == [2, 4, 6, 8]


def test_a_failed_replacement_keeps_the_old_checkpoint(tmp_path, save, part, monkeypatch):
    before = hashes(save(tmp_path, 4))
    folder = begin(tmp_path, 4, "again")
    writer.write_slices(folder, 0, *part(0, 1))
    real = Path.rename

    def rename(path, target):
        if path == folder:
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        writer.commit(folder, 4, wait(folder, 1, Clock()), {})
    assert hashes(latest_valid(tmp_path)) == before


def test_damaged_checkpoints_after_the_resumed_step_are_renamed_and_not_counted(tmp_path, save):
    for step in (0, 3, 4, 6, 8):
        save(tmp_path, step, writers=1)
    for step in (6, 8):
        (checkpoint_dir(tmp_path, step) / "manifest.json").unlink()
    save(tmp_path, 5, writers=1)
    writer.prune(tmp_path, 5, keep_last=2)
    assert list_steps(tmp_path) == [0, 4, 5, 6, 8], "only steps up to the one just saved count"
    (checkpoint_dir(tmp_path, 8).with_suffix(".damaged")).mkdir()
    moved = writer.set_aside(tmp_path, newer_than=5)
    assert [path.name for path in moved] == ["step_00000006.damaged", "step_00000008.damaged2"]
    assert list_steps(tmp_path) == [0, 4, 5]
    assert (moved[0] / "rank_00000.safetensors").is_file()
    save(tmp_path, 6, writers=1)
    assert latest_valid(tmp_path) == checkpoint_dir(tmp_path, 6)


def test_no_pickle_in_a_checkpoint(tmp_path, save):
    names = sorted(path.name for path in save(tmp_path, 1, writers=2).iterdir())
    assert names == ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]


def test_a_full_disk_is_a_checkpoint_error(tmp_path, monkeypatch):
    """safetensors reports it as SafetensorError, which is not an OSError."""

    def save_file(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", save_file)
    with pytest.raises(CheckpointError, match="cannot write .*: I/O error: No space left"):
        writer.write_slices(begin(tmp_path, 1), 0, {}, {})
