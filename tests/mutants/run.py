"""Apply every mutant to a copy of the repository and print which test killed it: ``python tests/mutants/run.py``.

torch and its compiler are imported once. Each mutant is tested in a forked child that imports the mutated package. A
mutant is killed if one of its tests fails; import and collection errors do not count. The same tests must pass on an
unchanged copy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy  # noqa: E402, F401  imported once for all children
import pytest  # noqa: E402
import torch._dynamo  # noqa: E402, F401
from table import MUTANTS, ROOT, Mutant  # noqa: E402

COPIED = ("flowception", "tests", "benchmarks", "data_prep", "pyproject.toml")
UNCHANGED = "no change"
WRONG_PACKAGE = 99


@dataclass
class Verdict:
    """Result of one mutant."""

    name: str
    killed_by: str | None
    """The first test that failed; None if none did."""
    exit_code: int
    """Exit code of pytest: 0 all passed, 1 some failed."""
    seconds: float
    log: str
    """End of the pytest output."""

    @property
    def as_it_should_be(self) -> bool:
        """Whether the mutant was killed by a failing test, or the unchanged copy passed all tests."""
        if self.name == UNCHANGED:
            return self.exit_code == 0
        return self.exit_code == 1 and self.killed_by is not None


class _FirstFailure:
    """pytest plugin that records the first failed test."""

    node_id: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.node_id is None:
            self.node_id = report.nodeid


def _test_in_child(copy: Path, tests: tuple[str, ...]) -> None:
    """In the forked child: run the tests of a copy on its package, write the result next to it, and exit."""
    os.chdir(copy)
    log = os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["PYTHONPATH"] = str(copy)  # for processes started by tests
    sys.path.insert(0, str(copy))
    first = _FirstFailure()
    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[first]))
    package = sys.modules.get("flowception")
    if package is not None and not str(package.__file__).startswith(str(copy)):
        code = WRONG_PACKAGE
    (copy / "verdict.json").write_text(json.dumps([code, first.node_id]))
    sys.stdout.flush()
    os._exit(0)


def _start(mutant: Mutant, folder: Path) -> tuple[int, Path]:
    """Make the copy of a mutant and fork a child that tests it."""
    copy = Path(tempfile.mkdtemp(dir=folder)).resolve()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, copy / name)
    for edit in mutant.edits:
        edit.apply(copy)
    child = os.fork()
    if child == 0:
        try:
            _test_in_child(copy, mutant.tests)
        finally:
            os._exit(1)
    return child, copy


def _finish(mutant: Mutant, copy: Path, began: float) -> Verdict:
    result, log = copy / "verdict.json", copy / "log.txt"
    code, node_id = json.loads(result.read_text()) if result.exists() else (-1, None)
    said = log.read_text()[-3000:] if log.exists() else ""
    shutil.rmtree(copy)
    return Verdict(mutant.name, node_id, code, time.monotonic() - began, said)


def run(mutants: tuple[Mutant, ...], processes: int = 2) -> Iterator[Verdict]:
    """Test the unchanged copy and every mutant, several at once.

    Args:
        mutants: Mutants to test.
        processes: Maximum number of concurrent children.

    Yields:
        Verdicts in order of completion.
    """
    every_test = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    waiting = [Mutant(UNCHANGED, (), every_test), *mutants]
    running: dict[int, tuple[Mutant, Path, float]] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                mutant = waiting.pop(0)
                child, copy = _start(mutant, Path(folder))
                running[child] = (mutant, copy, time.monotonic())
            child, _ = os.wait()
            yield _finish(*running.pop(child))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 0 if every mutant was killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", help="only mutants whose name contains this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the verdicts")
    options = parser.parse_args(arguments)
    chosen = tuple(mutant for mutant in MUTANTS if (options.only or "") in mutant.name)
    if not chosen:
        parser.error(f"no mutant's name contains {options.only!r}")
    verdicts = []
    print("| mutant | killed by | s |\n|---|---|---|")
    for verdict in run(chosen, options.processes):
        verdicts.append(verdict)
        fate = "all tests pass" if verdict.exit_code == 0 else verdict.killed_by or f"pytest exit {verdict.exit_code}"
        mark = "" if verdict.as_it_should_be else " **WRONG**"
        print(f"| {verdict.name} | {fate.removeprefix('tests/')}{mark} | {verdict.seconds:.0f} |", flush=True)
    wrong = [verdict for verdict in verdicts if not verdict.as_it_should_be]
    for verdict in wrong:
        print(f"\n--- {verdict.name}: pytest exit {verdict.exit_code}\n{verdict.log}")
    if options.json:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
