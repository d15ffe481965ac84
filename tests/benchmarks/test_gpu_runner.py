"""``benchmarks/gpu.sh`` apart from its checks: checks that hang or die, console lines, JSON, page."""

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import page as page_script
from benchmarks.gpu import run
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.forecasts import CHANGES
from benchmarks.gpu.outcome import FAIL, Check, Outcome, Record
from benchmarks.gpu.recipe_checks import ARMS, LARGEST_DIFFERENCE, _unlike
from benchmarks.gpu.table import CHECKS, TOTAL_LIMIT_S
from benchmarks.gpu.waiting_check import busy_ms, short_path

FOREVER_S = 600.0
MACHINE = {"device": "cpu", "card": None, "torch": "2.13.0", "date": "2026-11-27"}


def check(number, function, limit_s=FOREVER_S):
    return Check(number, function, "what it does", f"tests.benchmarks.fake_checks:{function}", limit_s)


class Clock:
    """A clock that advances on request."""

    now = 100.0

    def __call__(self):
        return self.now


def budget(total_s=FOREVER_S):
    """A budget that is never used up."""
    return Budget(total_s, 1.0, Clock())


def run_one(function, folder, limit_s=FOREVER_S):
    return run.run_check(check(1, function), "cpu", folder, limit_s)


def test_a_check_that_hangs_is_ended_at_its_limit(tmp_path):
    record = run_one("hangs", tmp_path, 0.2)
    assert (record.outcome.verdict, record.outcome.summary) == (FAIL, "killed at its limit of 0.2 s")


def test_what_a_check_started_ends_with_it(tmp_path):
    limit_s = 0.2
    while not (tmp_path / "child.pid").exists():  # a busy machine may need more than the limit to get so far
        folder = tmp_path / f"{limit_s:g}"
        folder.mkdir()
        assert run_one("hangs_with_a_child", folder, limit_s).outcome.verdict == FAIL
        if (folder / "child.pid").exists():
            (folder / "child.pid").rename(tmp_path / "child.pid")
        limit_s *= 2
    status = Path("/proc", (tmp_path / "child.pid").read_text(), "status")
    while _lives(status):  # the kill has been sent; pytest's own time limit ends this if it was not
        time.sleep(0.01)


def _lives(status):
    try:
        return re.search(r"^State:\s+[ZX]", status.read_text(), re.MULTILINE) is None
    except OSError:
        return False


def test_a_child_of_a_child_has_an_output_of_its_own(tmp_path):
    record = run_one("prints_from_a_child_of_its_own", tmp_path)
    assert (record.outcome.verdict, record.outcome.summary) == ("pass", "0, the inner one was here")
    assert (tmp_path / "check_01" / "log").read_text() == "and so was the outer one\n"


def test_a_child_never_goes_on_as_its_parent(tmp_path):
    """It would return from ``run_check`` a second time."""
    own = os.getpid()
    record = run_one("raises_where_nothing_can_be_printed", tmp_path)
    if os.getpid() != own:
        os._exit(99)
    assert (record.outcome.verdict, record.outcome.summary) == (FAIL, "exited with 1")


def test_one_that_dies_or_fails_says_why_and_the_rest_go_on(tmp_path, capfd):
    functions = ["raises", "notes_and_is_killed", "fails", "needs", "passes"]
    checks = [check(number, function) for number, function in enumerate(functions, 1)]
    path = tmp_path / "result.json"
    records = run.run_all(checks, "cpu", MACHINE, path, tmp_path, budget(), tmp_path / "logs")
    lines = capfd.readouterr().out.splitlines()
    assert [line[:40].split()[:3] for line in lines] == [
        ["1", "raises", "FAIL"],
        ["2", "notes_and_is_killed", "FAIL"],
        ["3", "fails", "FAIL"],
        ["4", "needs", "needs"],
        ["5", "passes", "pass"],
    ]
    said = [record.outcome.summary for record in records]
    assert said == [
        "exited with 1; last output: RuntimeError: CUDA error: an illegal memory access was encountered",
        "killed by SIGKILL (before: one of two arms took 3 ms)",
        "the answer is 41, not 42",
        "a reason",
        "on cpu",
    ]
    assert [record.outcome.figures for record in records] == [{}, {"first_ms": 3.0}, {"answer": 41}, {}, {"answer": 42}]
    result = json.loads(path.read_text())
    assert [found["outcome"]["summary"] for found in result["checks"]] == said
    assert not result["complete"], "five are not twelve"
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == [f"check_0{number}.log" for number in (1, 2, 3)]
    assert "Traceback" in (tmp_path / "logs" / "check_01.log").read_text()


def test_the_json_is_there_after_every_check(tmp_path, monkeypatch):
    path, seen = tmp_path / "result.json", []
    real = run.run_check

    def watched(*arguments):
        seen.append(len(json.loads(path.read_text())["checks"]) if path.exists() else 0)
        return real(*arguments)

    monkeypatch.setattr(run, "run_check", watched)
    run.run_all([check(1, "passes"), check(2, "fails"), check(3, "passes")], "cpu", MACHINE, path, tmp_path, budget())
    assert seen == [0, 1, 2]


def test_a_check_for_which_no_time_is_left_is_a_failure_that_says_so(tmp_path):
    (record,) = run.run_all([check(7, "passes")], "cpu", MACHINE, None, tmp_path, budget(0.0), tmp_path / "logs")
    assert record.outcome.verdict == FAIL
    assert record.outcome.summary == (
        "not run: the 0 s for all checks are used up or reserved for later ones; run it with --only 7"
    )


def run_on_a_clock(monkeypatch, folder, seconds, started_s=0.0, checks=CHECKS, patience=1.0):
    """Run checks that take given seconds, or their limit if that is less.

    Args:
        monkeypatch: Pytest's.
        folder: Where they may write.
        seconds: By number; every other takes as long as it may.
        started_s: Seconds from the start of the script to the first check.
        checks: Which.
        patience: Of the budget.

    Returns:
        Seconds that each was given, by number, and the clock's seconds at the end.
    """
    clock, given = Clock(), {}
    watched = Budget(TOTAL_LIMIT_S, patience, clock)
    clock.now += started_s

    def pretend(check, device, folder, limit_s):
        given[check.number] = limit_s
        clock.now += min(seconds.get(check.number, limit_s), limit_s)
        return Record(check.number, check.name, 0.0, Outcome("pass", "pretended"))

    monkeypatch.setattr(run, "run_check", pretend)
    run.run_all(checks, "cuda", MACHINE, None, folder, watched)
    return given, watched.used_s


def test_all_checks_together_end_in_time_though_each_takes_all_it_may(tmp_path, monkeypatch):
    for started_s in (0.0, 20.0, 120.0):
        given, used_s = run_on_a_clock(monkeypatch, tmp_path, {}, started_s)
        assert used_s <= TOTAL_LIMIT_S < 9 * 60
        reserved = {entry.number: entry.reserved_s for entry in CHECKS if entry.reserved_s}
        assert list(reserved) == [10, 11, 12]
        assert all(given[number] >= seconds for number, seconds in reserved.items())
        assert all(given[entry.number] <= entry.limit_s for entry in CHECKS if entry.number in given)


def test_what_quick_checks_leave_is_for_those_after_them(tmp_path, monkeypatch):
    given, _ = run_on_a_clock(monkeypatch, tmp_path, dict.fromkeys(range(1, 10), 10.0), 20.0)
    assert given == {entry.number: entry.limit_s for entry in CHECKS}


def test_time_is_kept_only_for_checks_that_are_to_be_run(tmp_path, monkeypatch):
    only = [entry for entry in CHECKS if entry.number in (5, 12)]
    given, _ = run_on_a_clock(monkeypatch, tmp_path, {}, TOTAL_LIMIT_S - 50.0, only)
    assert given == {5: 15.0, 12: 35.0}


def test_patience_is_of_limits_and_of_what_is_kept(tmp_path, monkeypatch):
    checks = [replace(entry, limit_s=400.0) for entry in CHECKS if entry.number in (9, 10)]
    given, _ = run_on_a_clock(monkeypatch, tmp_path, {}, checks=checks, patience=10.0)
    assert given == {9: 10 * (TOTAL_LIMIT_S - 160.0), 10: 10 * 160.0}


def test_time_counts_from_the_start_of_the_script(monkeypatch):
    """Time spent before the first check counts."""
    clock = Clock()
    monkeypatch.setattr(run.time, "monotonic", clock)
    monkeypatch.setattr(run, "import_once", lambda: setattr(clock, "now", clock.now + 60.0))

    def find(device, folder):
        clock.now += 30.0
        return MACHINE

    def watch(checks, device, machine, path, folder, budget, logs):
        assert budget.used_s == 90.0
        return []

    monkeypatch.setattr(run, "find_machine", find)
    monkeypatch.setattr(run, "run_all", watch)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert run.main(["--device", "cpu"]) == 0


@pytest.mark.parametrize(("functions", "code"), [(["passes", "needs"], 0), (["passes", "fails"], 1), (["raises"], 1)])
def test_the_exit_code_says_whether_any_failed(functions, code, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHECKS", [check(number, name) for number, name in enumerate(functions, 1)])
    monkeypatch.setattr(run, "import_once", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    page = tmp_path / "page.md"
    assert run.main(["--device", "cpu", "--page", str(page)]) == code
    assert "its figures do not apply to GPUs" in page.read_text()


@pytest.mark.parametrize("only", ["0", "13", "one", "1,,3"])
def test_numbers_that_are_no_checks_are_rejected(only, capsys):
    with pytest.raises(SystemExit):
        run.parse_arguments(["--only", only])
    assert "--only must be numbers from 1 to 12" in capsys.readouterr().err


def test_only_chooses_checks_in_their_order():
    assert [chosen.number for chosen in run.parse_arguments(["--only", "3,1"]).checks] == [1, 3]
    assert len(run.parse_arguments([]).checks) == 12


def test_the_table_counts_to_twelve_and_each_function_is_there():
    assert [entry.number for entry in CHECKS] == list(range(1, 13))
    for entry in CHECKS:
        module, name = entry.function.split(":")
        assert re.search(rf"^def {name}\(", Path(module.replace(".", "/") + ".py").read_text(), re.MULTILINE), entry


def gpu_result():
    """A result as a run on a card writes it, with invented figures."""
    kept = {"checkpointed_blocks": 4, "layers": 38}
    arms = {
        arm.name: {"ms_per_pack": 300.0 + 11 * number, "mfu": 0.4, "peak_gib": 60.0, "estimated_gib": 70.5} | kept
        for number, arm in enumerate(ARMS[:-1])
    }
    arms[ARMS[-1].name] = {"out_of_memory": "tried to allocate 2 GiB", "peak_gib": 78.0, "estimated_gib": 90.0} | kept
    times = {"forward_ms": 1.0, "backward_ms": 2.0}
    segments = {
        "FA2 static": {"forward_ms": 0.75, "backward_ms": 1.5},
        "FA2 tight": {"forward_ms": 0.5, "backward_ms": 1.0},
    }
    leaves = {f"{name} eager": times for name in ("modulate", "add_gated", "norm_and_rotate", "swiglu")}
    compiled = {name.replace("eager", "compiled"): found for name, found in leaves.items()}
    figures = {
        6: {"products": {name: times for name in "abcd"}, "attention": times, "leaves": leaves | compiled},
        7: segments | {"kernels": {"FA3": "no package", "FA4": "no package"}},
        10: {"arms": arms},
    }
    checks = [
        {
            "number": entry.number,
            "name": entry.name,
            "seconds": 1.0,
            "outcome": vars(Outcome("measured", f"said by | {entry.number}", figures.get(entry.number, {}))),
        }
        for entry in CHECKS
    ]
    return {
        "device": "cuda",
        "card": "NVIDIA H100 80GB HBM3",
        "torch": "2.11.0",
        "date": "2026-12-01",
        "checks": checks,
    }


def test_the_page_shows_forecast_beside_measured():
    text = page_script.page([gpu_result()])
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for number, change in enumerate(CHANGES):
        assert f"{change.ms_per_pack:.0f} ms" in rows[f"{number}. {change.name}"]
    measured = [row.split("|")[4].strip() for name, row in rows.items() if re.match(r"\d\. ", name)]
    assert measured == [
        "300 ms, 40.0 %, 4 of 38 blocks checkpointed; 60.0 GiB of 70.5 estimated",
        "322 ms, 40.0 %, 4 of 38 blocks checkpointed; 60.0 GiB of 70.5 estimated",
        "out of memory, 4 of 38 blocks checkpointed",
        "in all rows; alone it saves 0.25 + 0.50 ms a block (check 7)",
        "not measured: FA3 no package",
        "311 ms, 40.0 %, 4 of 38 blocks checkpointed; 60.0 GiB of 70.5 estimated",
    ]
    assert rows["matrix products"].split("|")[2:4] == [" 1.43 + 2.86 ", " 4.00 + 8.00 "]
    assert rows["elementwise, eager"].split("|")[2:4] == [" 0.79 + 2.30 ", " 7.00 + 14.00 "]
    assert "Run on: NVIDIA H100 80GB HBM3 (torch 2.11.0, 2026-12-01)." in text
    assert "not yet run" not in text
    assert r"said by \| 3" in text


def test_without_a_result_the_page_says_so_and_shows_forecasts_as_forecasts():
    text = page_script.page([])
    assert "**Not yet run:**" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and re.match(r"\| (\d|[a-z])", line)]
    assert len([row for row in rows if row.endswith("not yet run |")]) == len(CHECKS) + len(CHANGES) + 5
    assert "473 ms" in text


def test_an_unfinished_result_is_called_one():
    result = gpu_result()
    result["checks"] = result["checks"][:9]
    text = page_script.page([result])
    assert "Not all checks were run on: NVIDIA H100" in text
    assert "| 12 |" in text
    assert text.count("not yet run") == 3 + 4, "three checks, four arms"


def test_the_page_in_the_repository_is_not_stale():
    expected = page_script.page(page_script.read_results())
    assert page_script.PAGE.read_text() == expected, "run python benchmarks/gpu/page.py"


def test_forecasts_without_empty_tiles():
    """Two forward passes and one backward pass of 38 blocks with recomputation."""
    assert CHANGES[0].ms_with_change_3 == pytest.approx(473 - 38 * (2 * 0.12 + 0.36))
    assert CHANGES[2].ms_with_change_3 == pytest.approx(293 - 38 * (0.12 + 0.36))
    assert [change.ms_with_change_3 for change in CHANGES[3:]] == [271, 254, 238]


def test_results_are_named_by_card_and_day():
    machine = {"card": "NVIDIA H100 80GB HBM3", "date": "2026-12-01"}
    assert run.default_json(machine).name == "gpu_h100-80gb-hbm3_2026-12-01.json"


def test_arms_that_train_otherwise_are_found():
    close = 1 + LARGEST_DIFFERENCE / 2
    arms = {"a": {"losses": [2.0, 1.0]}, "b": {"losses": [2.0 * close, 1.0]}, "c": {"out_of_memory": "yes"}}
    assert _unlike(arms) == []
    assert _unlike(arms | {"d": {"losses": [2.0, 1.1]}}) == ["d: losses must equal [2.0, 1.0], got [2.0, 1.1]"]
    assert len(_unlike(arms | {"d": {"losses": [2.0, float("nan")]}})) == 1


def test_busy_time_is_the_union_of_spans():
    assert busy_ms([(1000.0, 3000.0), (2000.0, 2500.0), (2000.0, 4000.0), (6000.0, 7000.0)]) == 4.0
    assert busy_ms([]) == 0.0


def test_source_files_are_named_from_their_package():
    assert short_path(str(page_script.ROOT / "flowception" / "rng.py")) == "flowception/rng.py"
    assert short_path("/tmp/site/deepspeed/runtime/engine.py") == "deepspeed/runtime/engine.py"
