"""Every mutant is killed by its test (``run.py``) and applies to the current code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import table  # noqa: E402


@pytest.mark.parametrize("mutant", table.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_code(mutant, tmp_path):
    """Each edit finds its source exactly once and the result is valid Python, so no mutant goes stale."""
    for edit in mutant.edits:
        copy = tmp_path / edit.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            shutil.copy(table.ROOT / edit.path, copy)
        edit.apply(tmp_path)
        compile(copy.read_text(), edit.path, "exec")
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (table.ROOT / path).read_text()


def test_a_stale_mutant_is_refused(tmp_path):
    (tmp_path / "code.py").write_text("a = 1\na = 1\n")
    for old in ("a = 2", "a = 1"):
        with pytest.raises(ValueError, match="exactly once"):
            table.Edit("code.py", old, "a = 3").apply(tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_every_mutant_is_killed(tmp_path):
    verdicts = tmp_path / "verdicts.json"
    command = [sys.executable, str(HERE / "run.py"), "--json", str(verdicts)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=table.ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = [verdict for verdict in json.loads(verdicts.read_text()) if verdict["killed_by"]]
    assert len(killed) == len(table.MUTANTS) >= 16
