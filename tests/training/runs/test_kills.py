"""Signals to real jobs. After SIGKILLs at random steps the run must end like an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowception.checkpoint.format import checkpoint_dir, list_steps
from flowception.checkpoint.reader import hashes, latest_valid
from tests.distributed_worker import end_all, rank_environment
from tests.fork_server import Forked, Server
from tests.ports import free_port
from tests.training.workers.toy_set import write_config, write_set

ROOT = Path(__file__).resolve().parents[3]
KILLED_MAIN = "tests.training.workers.killed_main"
STEPS, KILLS = 40, 5


def start(config: Path, log: Path, prepared: tuple[str, int, int] | None = None) -> list[Forked]:
    """Two ranks of ``train/main.py``, optionally set up to be killed (``killed_main.py``)."""
    port, server = free_port(), Server.shared()
    return [
        server.start(KILLED_MAIN, "main", prepared, str(config), environment=rank_environment(rank, 2, port), log=log)
        for rank in range(2)
    ]


def start_interpreters(config: Path, log: Path) -> list[subprocess.Popen]:
    """The same two ranks as a launcher starts them: new interpreters that import everything themselves."""
    port, command = free_port(), [sys.executable, ROOT / "train" / "main.py", "--config", config]
    with log.open("w") as stream:
        return [
            subprocess.Popen(command, env=rank_environment(rank, 2, port), stdout=stream, stderr=subprocess.STDOUT)
            for rank in range(2)
        ]


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def wait_for_step(processes, run_dir, step, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while steps_done(run_dir) < step:
        assert time.monotonic() < deadline, f"step {step} did not come"
        assert all(process.poll() is None for process in processes), "a rank ended early"
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_five_kills_change_nothing(tmp_path):
    data = write_set(tmp_path / "shards")
    settings = {"max_steps": STEPS, "checkpoint__save_every_steps": 3, "validation__every_steps": 15}
    whole = write_config(tmp_path / "whole.yaml", tmp_path / "whole", data, **settings)
    killed = write_config(tmp_path / "killed.yaml", tmp_path / "killed", data, **settings)
    processes = start(whole, tmp_path / "whole.log")
    assert [process.wait(240) for process in processes] == [0, 0], (tmp_path / "whole.log").read_text()[-4000:]

    chance = random.Random(int.from_bytes(os.urandom(4), "big"))
    kill_steps = sorted(chance.sample(range(1, STEPS - 1), KILLS))
    print("killed at steps", kill_steps)
    for step in kill_steps:
        processes = start(killed, tmp_path / "killed.log")
        try:
            wait_for_step(processes, tmp_path / "killed", step)
            time.sleep(0.3 * chance.random())
            processes[chance.randrange(2)].send_signal(signal.SIGKILL)
            time.sleep(0.5 * chance.random())
        finally:
            end_all(processes)
    processes = start(killed, tmp_path / "killed.log")
    assert [process.wait(240) for process in processes] == [0, 0], (tmp_path / "killed.log").read_text()[-4000:]

    command = [sys.executable, "-m", "flowception.cli", "checkpoint", str(tmp_path / "killed"), "--hash"]
    assert hashes(checkpoint_dir(tmp_path / "killed", STEPS)) == hashes(checkpoint_dir(tmp_path / "whole", STEPS)), (
        command
    )
    assert list_steps(tmp_path / "killed")[-1] == STEPS
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count('"step"') for name in ("whole", "killed")]
    assert lines == [STEPS, STEPS]
    assert (tmp_path / "killed.log").read_text().count("resuming") >= 1


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kills_in_the_middle_of_saves_change_nothing(tmp_path):
    """Each job is killed in its second save, one operation or one rank further on."""
    data = write_set(tmp_path / "shards")
    settings = {"checkpoint__save_every_steps": 2, "checkpoint__keep_last": 2, "validation__every_steps": None}
    configs = {
        name: write_config(tmp_path / f"{name}.yaml", tmp_path / name, data, max_steps=16, **settings)
        for name in ("whole", "killed")
    }
    processes = start(configs["whole"], tmp_path / "whole.log")
    assert [process.wait(240) for process in processes] == [0, 0], (tmp_path / "whole.log").read_text()[-4000:]
    checkpoints, newest = tmp_path / "killed" / "checkpoints", 0
    for place, rank in (("half_written", 1), ("write_slices", 1), ("wait_for_receipts", 0), ("commit", 0)):
        processes = start(configs["killed"], tmp_path / "killed.log", (place, rank, 2))
        try:
            assert processes[rank].wait(240) == -signal.SIGKILL, (tmp_path / "killed.log").read_text()[-4000:]
        finally:
            end_all(processes)
        before, newest = newest, int(latest_valid(tmp_path / "killed").name[5:])
        if place == "half_written":  # it saves steps 0 and 2; later jobs save 2 and 4 steps after their start
            assert newest == 0
            assert len(list(checkpoints.glob("*.tmp/rank_00001.safetensors"))) == 1
            assert not list(checkpoints.glob("*.tmp/rank_00001.receipt"))
        if place == "write_slices":  # its receipt is written, so rank 0 may commit before it is killed
            assert newest - before in (2, 4)
        if place == "wait_for_receipts":
            assert newest - before == 2
            assert len(list(checkpoints.glob("*.tmp/rank_00001.receipt"))) == 1
        if place == "commit":
            assert newest - before == 4
    processes = start(configs["killed"], tmp_path / "killed.log")
    assert [process.wait(240) for process in processes] == [0, 0], (tmp_path / "killed.log").read_text()[-4000:]
    assert not list(checkpoints.glob("*.tmp"))
    assert list_steps(tmp_path / "killed") == list_steps(tmp_path / "whole") == [0, 14, 16]
    ends = [hashes(checkpoint_dir(tmp_path / name, 16)) for name in ("killed", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "begin"), [(signal.SIGTERM, start), (signal.SIGUSR1, start_interpreters)])
def test_a_signal_saves_and_exits_with_85(tmp_path, number, begin):
    config = write_config(tmp_path / "c.yaml", tmp_path / "run", write_set(tmp_path / "shards"), max_steps=100_000)
    processes = begin(config, tmp_path / "log")
    try:
        wait_for_step(processes, tmp_path / "run", 3)
        processes[1].send_signal(number)
        assert [process.wait(240) for process in processes] == [85, 85]
    finally:
        end_all(processes)
    assert list_steps(tmp_path / "run")[-1] == steps_done(tmp_path / "run")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_second_job_is_refused_while_the_first_lives(tmp_path):
    config = write_config(tmp_path / "c.yaml", tmp_path / "run", write_set(tmp_path / "shards"), max_steps=100_000)
    first = start(config, tmp_path / "first.log")
    second = []
    try:
        wait_for_step(first, tmp_path / "run", 1)
        second = start(config, tmp_path / "second.log")
        assert [process.wait(240) for process in second] == [2, 2]
        assert f"process {first[0].pid} on" in (tmp_path / "second.log").read_text()
        assert all(process.poll() is None for process in first)
    finally:
        end_all(first + second)
