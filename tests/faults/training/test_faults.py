"""The faults benchmark on a sample of every kind, and that it can fail."""

import json
import os
import random
import re
import signal
from collections import Counter

import pytest

from tests.faults.training import page
from tests.faults.training.cases import ALL_SETTINGS, FEW_SETTINGS, SHARES, STEP_PLACES, Deck
from tests.faults.training.hooks import Hooks, Injection
from tests.faults.training.sabotage import SABOTAGES
from tests.faults.training.scene import Reference
from tests.fork_server import run_python

SAVE = ["mkdir step_00000006.tmp", "write rank_00000.safetensors", "fsync rank_00000.safetensors", "rename step"]
RECORD = {
    "kind": "SIGKILL, save",
    "place": "write rank_00000.safetensors",
    "world_sizes": [2],
    "stages": [3],
    "ranks": [0],
    "exit_codes": [[-9, 1], [0, 0]],
    "resumed_steps": [None, 4],
    "lost_steps": 2,
    "mismatches": [],
    "manual_steps": 0,
    "unexpected": [],
    "loss_difference": 0.0,
    "seconds": 2.0,
}


class FakeScene:
    """References of a run with four operations per save and 40 events per place."""

    def reference(self, world_size, stage):
        places = (*STEP_PLACES, "batch")
        events = {place: [40] * world_size for place in places}
        return Reference({}, [], {}, events, [SAVE] * world_size, [["open run.lock", "write run.lock"]])


def run_benchmark(*words):
    return run_python(["benchmarks/faults.py", *words], os.environ, timeout_s=1400)


def test_a_sample_has_every_kind_and_the_full_benchmark_every_save_operation():
    cases = Deck(FakeScene(), random.Random(3), FEW_SETTINGS).draw(24)
    assert len(cases) == 24
    words = (
        "SIGKILL, save",
        "resuming",
        "run directory",
        "damaged",
        "disk",
        "preemption",
        "left-overs",
        "second",
        "other",
    )
    for word in words:
        assert any(word in case.kind for case in cases), word
    cases = Deck(FakeScene(), random.Random(3), ALL_SETTINGS).draw(200)
    assert len(cases) == 200
    found = Counter(
        (injection.rank, injection.at, injection.action)
        for case in cases
        for injection in case.attempts[0].injections
        if case.kind == "SIGKILL, save" and case.attempts[0].world_size == 2
    )
    for rank in range(2):
        assert {(rank, at, "kill") for at in range(1, len(SAVE) + 1)} <= found.keys()
        assert (rank, 2, "cut") in found
    assert set(SHARES) == {name for name in SHARES if callable(getattr(Deck, name))}


def test_a_seed_draws_the_same_cases():
    def places(seed):
        return [case.place for case in Deck(FakeScene(), random.Random(seed), FEW_SETTINGS).draw(40)]

    assert places(5) == places(5)
    assert places(5) != places(6)


def test_hooks_count_the_operations_of_a_save_from_the_first(tmp_path):
    hooks = Hooks(0, tmp_path / "run", tmp_path, (Injection("save:6", 2, 0, "signal", number=0),), record=True)
    folder = tmp_path / "run" / "checkpoints"
    hooks.file_event("write", folder / "step_00000004" / "manifest.json")
    hooks.file_event("mkdir", folder / "step_00000006.tmp")
    assert not (tmp_path / "fired-0").exists()
    hooks.file_event("rename", folder / "step_00000002")
    assert json.loads((tmp_path / "fired-0").read_text()) == "rename step_00000002"
    hooks.file_event("write", tmp_path / "run" / "config.yaml")
    hooks.file_event("write", tmp_path / "elsewhere")
    events = [json.loads(line) for line in (tmp_path / "events-0.jsonl").read_text().splitlines()]
    assert [place for place, _ in events] == ["save:4", "save:6", "save:6", "files"]


def test_a_full_disk_fails_only_operations_that_need_space(tmp_path):
    full = Injection("save:6", 1, 0, "full_disk", events=3)
    hooks = Hooks(0, tmp_path / "run", tmp_path, (full,))
    file = tmp_path / "run" / "checkpoints" / "step_00000006.tmp" / "rank_00000.safetensors"
    hooks.file_event("unlink", file)
    shares = []
    with pytest.raises(OSError, match="No space left"):
        hooks.file_event("write", file, shares.append)
    with pytest.raises(OSError, match="No space left"):
        hooks.file_event("fsync", file)
    hooks.file_event("rename", file)
    assert shares == [0.5]


def test_a_kill_after_a_full_disk_waits_for_it(tmp_path, monkeypatch):
    cases = Deck(FakeScene(), random.Random(3), FEW_SETTINGS).draw(400)
    kill, full = next(case for case in cases if case.kind == "disk full, then SIGKILL").attempts[0].injections
    killed, saving = (Hooks(of.rank, tmp_path / "run", tmp_path, (kill, full)) for of in (kill, full))
    kills = []

    def save_meanwhile(note):
        for _ in range(full.at - 1):
            saving.event(full.place, full.operation)
        with pytest.raises(OSError, match="No space left"):
            saving.event(full.place, full.operation)
        assert note.exists()

    monkeypatch.setattr("tests.faults.training.hooks._wait_for", save_meanwhile)
    monkeypatch.setattr("os.kill", lambda process, number: kills.append((number, (tmp_path / "fired-1").exists())))
    for _ in range(kill.at):
        killed.event(kill.place)
    assert kills == [(signal.SIGKILL, True)]


def test_the_page_counts_what_failed():
    bad = RECORD | {"mismatches": ["weights differ"], "manual_steps": 2, "unexpected": ["exit codes [1, 1]"]}
    assert page.failures([RECORD]) == []
    (line,) = page.failures([RECORD, bad])
    assert "weights differ; exit codes [1, 1]; 2 manual steps" in line
    assert page.table([RECORD, bad]).splitlines()[-1] == "| all | 2 | 2 | 4 | 1 | 2 | 1 | 2.0 |"


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_sample_of_faults_changes_nothing(tmp_path):
    done = run_benchmark("--faults", "24", "--seed", "1", "--json", str(tmp_path / "faults.json"))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "faults.json").read_text())["records"]
    assert len(records) == 24
    assert sum(bool(record["ranks"]) for record in records) >= 18


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(SABOTAGES))
def test_a_wrong_resume_is_detected(name):
    kinds = "damaged" if name == "verify" else "left-overs"
    done = run_benchmark("--faults", "24", "--seed", "1", "--kinds", kinds, "--sabotage", name)
    assert done.returncode == 1, done.stdout + done.stderr
    seen = {
        "moments": "weights differ; ema differ; optimizer differ",
        "ema": r"\]\]\): ema differ",
        "cursor": "packs differ",
        "verify": r"in place of 0|differ",
    }
    assert re.search(seen[name], done.stdout)
