"""Atomic writes, and one holder of a lock at a time."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from flowception.errors import ConfigError
from flowception.files import FileLock, write_atomically


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    write_atomically(tmp_path / "a.txt", "one")
    write_atomically(tmp_path / "a.txt", b"two")
    assert (tmp_path / "a.txt").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_cannot_be_written_leaves_the_old_content(tmp_path):
    write_atomically(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a.txt", "\udcff")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_second_holder_is_refused_with_the_first_ones_name(tmp_path):
    with FileLock(tmp_path / "sub" / "lock", ConfigError):
        with pytest.raises(ConfigError, match=r"sub is in use by process \d+ on .*; wait"):
            FileLock(tmp_path / "sub" / "lock", ConfigError, "wait")
        FileLock(tmp_path / "sub" / "other", ConfigError).release()
    FileLock(tmp_path / "sub" / "lock", ConfigError).release()
    assert [path.read_text() for path in (tmp_path / "sub").iterdir()] == ["", ""]


def test_a_folder_that_cannot_be_created_is_a_flowception_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be created or locked"):
        FileLock(tmp_path / "file" / "lock", ConfigError)


def test_a_lock_dies_with_its_process(tmp_path):
    script = "import os, sys, pathlib; from flowception.files import FileLock; "
    script += "FileLock(pathlib.Path(sys.argv[1]), OSError); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "lock")]).returncode == -9
    assert (tmp_path / "lock").exists()
    FileLock(tmp_path / "lock", ConfigError).release()


FORK_AND_DIE = """
import os, pathlib, sys, time
from flowception.files import FileLock
lock = FileLock(pathlib.Path(sys.argv[1]), OSError)
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, b"up")  # the fork is over, what runs after it in the child has run
    time.sleep(60)
os.read(reading, 2)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_lock_dies_with_its_process_though_a_forked_child_lives(tmp_path):
    command = [sys.executable, "-c", FORK_AND_DIE, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            assert process.wait() == -9
            FileLock(tmp_path / "lock", ConfigError).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_waiting_holders_take_turns(tmp_path):
    held, most = [], []

    def work():
        for _ in range(20):
            with FileLock(tmp_path / "lock", ConfigError, wait=True):
                held.append(1)
                most.append(len(held))
                held.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80
    assert max(most) == 1
