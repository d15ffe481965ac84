"""Real processes that hang, and what the watchdogs report and do."""

import json
import os
import re
import signal
import threading
import time
from contextlib import suppress

import pytest
import torch

from flowception.training.distributed import heartbeats, watchdog
from flowception.training.distributed.collectives import Ranks
from flowception.training.distributed.heartbeats import Beat
from flowception.training.distributed.watchdog import EXIT_HUNG, Watchdog
from tests.distributed_worker import end_all, run_distributed, start_ranks
from tests.training.workers.toy_set import write_set

pytestmark = pytest.mark.xdist_group("watchdog")

WORKER = "tests.training.workers.watchdog_worker"
PATIENCE_S = 150


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


class Job:
    """Two ranks that run a function of the worker; their output goes to files."""

    def __init__(self, folder, function, **arguments):
        self.logs = [folder / f"rank_{rank}.log" for rank in range(2)]
        self.processes = start_ranks(WORKER, function, self.logs, folder=str(folder), **arguments)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        end_all(self.processes)

    def exit_codes(self):
        return [process.wait(PATIENCE_S) for process in self.processes]

    def said(self):
        return [log.read_text() for log in self.logs]


def test_a_sleeping_rank_is_reported_with_its_stack_and_all_ranks_exit(tmp_path):
    with Job(tmp_path, "job", victim=1, poll_s=0.5, victim_notices=True) as job:
        wait_until((tmp_path / "asleep").exists)
        (tmp_path / "now").touch()
        assert job.exit_codes() == [EXIT_HUNG, EXIT_HUNG], job.said()
        report = (tmp_path / "heartbeats" / "report.txt").read_text()
        assert report.startswith("hang: rank 1 is behind\nrank 1 (process ")
        assert f"rank 1 (process {job.processes[1].pid} on " in report
        assert "step 3, backward, no progress for" in report
        assert "at asleep (" in report
        assert "1 other ranks wait, such as rank 0: step 3, backward" in report
        assert report.strip() in job.said()[0]
    stacks = [(tmp_path / "heartbeats" / f"rank_{rank:05d}.stacks.txt").read_text() for rank in range(2)]
    assert "asleep()" in stacks[1]
    assert "all_reduce" in stacks[0]
    for said, stack in zip(job.said(), stacks, strict=True):
        assert stack.splitlines()[0] == "thread MainThread, innermost call last:"
        assert "thread MainThread, innermost call last:" in said


@pytest.mark.long
@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_process_is_reported_by_the_other_rank(tmp_path, victim):
    with Job(tmp_path, "job", victim=victim, poll_s=0.2, victim_notices=False) as job:
        beat = heartbeats.path_of(tmp_path / "heartbeats", victim)
        wait_until(lambda: beat.exists() and "backward" in beat.read_text())
        job.processes[victim].send_signal(signal.SIGSTOP)
        wait_until(lambda: time.time() - json.loads(beat.read_text())["time_s"] > 6.0)
        (tmp_path / "now").touch()
        other = job.processes[1 - victim]
        assert other.wait(PATIENCE_S) == EXIT_HUNG, job.said()
        assert job.processes[victim].poll() is None
        said = job.said()[1 - victim]
        assert f"hang: rank {victim} is behind" in said
        assert re.search(r"no heartbeat for \d+ s \(the process is stopped, dead or disconnected\)", said)
        assert (tmp_path / "heartbeats" / "report.txt").is_file()


@pytest.mark.long
def test_a_run_that_hangs_in_reading_names_the_clips(tmp_path):
    write_set(tmp_path / "shards")
    with Job(tmp_path, "hanging_run") as job:
        assert job.exit_codes() == [EXIT_HUNG, EXIT_HUNG], job.said()
    report = (tmp_path / "run" / "heartbeats" / "report.txt").read_text()
    assert report.startswith("hang: rank 1 is behind"), report
    assert "step 4, data, no progress for" in report.splitlines()[1]
    assert "waiting for step 3 of epoch 0: clip clip-000" in job.said()[1]
    assert str(tmp_path / "shards") in job.said()[1]


def test_a_healthy_job_leaves_no_trace(tmp_path):
    assert run_distributed(WORKER, "healthy", 2, folder=str(tmp_path)) == [[], []]


def a_beat(rank, turn, *, in_collective=True, gpu_is_busy=False, idle_s=700.0):
    return Beat(
        rank=rank,
        time_s=0.0,
        turn=turn,
        phase="forward",
        step=12,
        idle_s=idle_s,
        where=f"line_of_{rank}",
        in_collective=in_collective,
        gpu_is_busy=gpu_is_busy,
        hung=False,
        host="node",
        process=100 + rank,
    )


def test_ranks_behind_are_silent_or_have_fewer_phases_or_wait_for_no_rank():
    beats = {rank: a_beat(rank, turn=40) for rank in range(4)}
    assert heartbeats.report(beats, []).startswith("hang: all ranks wait for each other\nrank 0 (process 100 on node)")
    free = beats | {2: a_beat(2, turn=40, in_collective=False)}
    assert heartbeats.report(free, []).startswith("hang: rank 2 is behind\nrank 2 (process 102 on node): step 12")
    late = free | {1: a_beat(1, turn=39), 3: a_beat(3, turn=39)}
    assert heartbeats.report(late, []).startswith("hang: 2 ranks (1, 3) are behind")
    silent = late | {0: None}
    assert heartbeats.report(silent, [0, 2]).startswith(
        "hang: 2 ranks (0, 2) are behind\nrank 0 has never written a heartbeat"
    )
    many = {rank: a_beat(rank, turn=7 if rank < 20 else 8) for rank in range(32)}
    assert heartbeats.report(many, []).splitlines()[0].endswith("14, 15, ...) are behind")
    assert "12 other ranks wait, such as rank 20: step 12, forward, no progress for 700 s, at line_of_20" in (
        heartbeats.report(many, [])
    )


def test_on_cuda_the_rank_with_an_idle_gpu_is_behind():
    """Collectives return at once there, so no rank is seen inside one."""
    beats = {rank: a_beat(rank, turn=40, in_collective=False, gpu_is_busy=True) for rank in range(4)}
    said = heartbeats.report(beats, [])
    assert said.startswith("hang: all ranks wait for each other or for a GPU\nrank 0 (process 100 on node): step 12")
    assert said.count("its GPU is busy") == 4
    asleep = beats | {2: a_beat(2, turn=40, in_collective=False)}
    assert heartbeats.report(asleep, []).startswith("hang: rank 2 is behind\nrank 2 (process 102 on node): step 12")
    late = beats | {1: a_beat(1, turn=39, in_collective=False, gpu_is_busy=True)}
    assert heartbeats.report(late, []).startswith("hang: rank 1 is behind\n")


def test_a_hang_report_is_kept_and_other_leftovers_are_removed(tmp_path):
    for number in (1, 2):
        heartbeats.begin(tmp_path)
        (tmp_path / "heartbeats" / "report.txt").write_text(str(number))
    heartbeats.begin(tmp_path)
    (tmp_path / "heartbeats" / "rank_00000.json").touch()
    heartbeats.begin(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["hang_1", "hang_2", "heartbeats"]
    assert os.listdir(tmp_path / "heartbeats") == []
    assert (tmp_path / "hang_2" / "report.txt").read_text() == "2"


def test_every_forward_pass_is_progress(alone):
    network = torch.nn.Linear(1, 1)
    opened = alone()
    with opened.each_forward(network, "samples"):
        for _ in range(3):
            network(torch.ones(1, 1))
        assert opened._progress == (4, "samples", 0)
    network(torch.ones(1, 1))
    assert opened._progress == (5, "between phases", 0)


def test_after_a_phase_the_enclosing_one_continues_even_after_an_error(alone):
    opened = alone()
    with opened.phase("rollback", 7):
        with suppress(ValueError), opened.phase("save"):
            assert opened._progress == (2, "save", 7)
            raise ValueError
        assert opened._progress == (3, "rollback", 7)
    assert opened._progress == (4, "between phases", 7)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Creates watchdogs of one rank without a process group."""
    monkeypatch.setattr(watchdog, "on_main", lambda ranks, action: action())
    ranks = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    numbers = {"hang_timeout_s": 1200.0, "data_stall_warning_s": 60.0, "poll_s": 0.01}
    return lambda **changes: Watchdog(tmp_path, ranks, **numbers | changes)


def test_time_while_the_process_is_stopped_does_not_count(alone, monkeypatch):
    """Polls appear to be a day apart. If that time counted, it would be a hang, and the process would exit."""
    looks, enough = [], threading.Event()

    class Days:
        time = staticmethod(time.time)

        @staticmethod
        def monotonic():
            looks.append(0)
            if len(looks) > 100:
                enough.set()
            return 86400.0 * len(looks)

    monkeypatch.setattr(watchdog, "time", Days)
    with alone(hang_timeout_s=3600.0) as opened:
        assert enough.wait(PATIENCE_S)
        assert 0 < opened._idle_s < 3600.0


def test_a_long_wait_for_data_warns_once_and_names_the_cause(alone, capfd):
    said = []

    def warnings():
        said.append(capfd.readouterr().err)
        return "".join(said).count("waiting for step 7 of epoch 0: clip x")

    with alone(hang_timeout_s=None, data_stall_warning_s=0.05) as opened:
        opened.waiting_for = lambda: "step 7 of epoch 0: clip x"
        with opened.phase("forward", 1):
            wait_until(lambda: opened._idle_s > 0.1)
            assert warnings() == 0
        with opened.phase("data", 2):
            wait_until(warnings)
            waited_s = opened._idle_s
            wait_until(lambda: opened._idle_s > waited_s + 0.1)
            assert warnings() == 1
        with opened.phase("data", 3):
            wait_until(lambda: warnings() == 2)
    assert "watchdog: rank 0: WARNING: no data for 0 s; waiting for step 7" in "".join(said)
