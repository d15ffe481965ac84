import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowception.errors import ConfigError
from flowception.training.distributed.launch import fill_environment
from flowception.training.signals import StopFlag
from tests.training.workers.toy_set import write_config, write_set

PATH = Path(__file__).parents[3] / "train" / "main.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("train_main", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def keep_signals():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "a.yaml", "b.yaml", "zero.stage=2", "--dry-run"],
        ["--local_rank=1", "--config", "a.yaml", "b.yaml", "zero.stage=2", "--dry-run"],
        ["--dry-run", "zero.stage=2", "--config", "a.yaml", "b.yaml"],
        ["--config", "a.yaml", "zero.stage=2", "b.yaml", "--dry-run", "--local-rank", "0"],
    ],
)
def test_files_and_overrides_in_any_order(main, words):
    arguments = main.parse(words)
    assert arguments.config == ["a.yaml", "b.yaml"]
    assert arguments.words == ["zero.stage=2"]
    assert arguments.dry_run


def test_dry_run_and_bad_input_by_exit_code(main, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    path = write_config(tmp_path / "c.yaml", tmp_path / "run", write_set(tmp_path / "shards"))
    assert main.main(["--config", str(path), "--dry-run", "--world-size", "2"]) == 0
    assert "dry run: nothing was started" in capsys.readouterr().out
    assert main.main(["--config", str(path), "optim.learning_rate=1", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate" in error
    assert error.count("\n") == 1


def test_dry_run_fails_on_a_problem_and_needs_no_data_with_synthetic_clips(main, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    path = write_config(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "nowhere")
    words = ["--config", str(path), "--dry-run", "--world-size", "2"]
    assert main.main(words) == 2
    assert "problem 1: " in capsys.readouterr().out
    assert main.main([*words, "--clip", "6x2x2", "--num-clips", "300", "--hfu", "0.3"]) == 0
    assert "at HFU 0.3 of 989 TFLOP/s per rank (H100, dense bf16)" in capsys.readouterr().out
    assert main.main([*words, "--hfu", "3"]) == 2
    assert "--hfu must be a number in (0, 1] (a share, such as 0.4), got 3.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "shared", "printed"),
    [
        ({"RANK": "0"}, True, "train/main.py: error: bad"),
        ({"RANK": "3"}, True, ""),
        ({"RANK": "3"}, False, "train/main.py: rank 3: error: bad"),
        ({"SLURM_PROCID": "2"}, False, "train/main.py: rank 2: error: bad"),
    ],
)
def test_a_rank_prints_only_its_own_errors(main, monkeypatch, capsys, variables, shared, printed):
    def fail(arguments, stop):
        error = ConfigError("bad")
        error.on_all_ranks = shared
        raise error

    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(main, "_run", fail)
    assert main.main(["--config", "c.yaml"]) == 2
    assert capsys.readouterr().err.strip() == printed


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_a_bad_configuration_prints_one_line_per_node(main, monkeypatch, capsys, tmp_path, local_rank, lines):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert main.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("rank 9: error: configuration file") == lines


def test_the_newest_step_is_printed(main, tmp_path, capsys):
    words = [str(write_config(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "nowhere")), "--newest-step"]
    assert main.main(["--config", *words]) == 0
    for step in (4, 12, 8):
        (tmp_path / f"run/checkpoints/step_{step:08d}").mkdir(parents=True)
    assert main.main(["--config", *words]) == 0
    assert capsys.readouterr().out == "-1\n12\n"


FAILING_MAIN = """
import runpy, sys, threading
from flowception.training.signals import StopFlag

def fail(self):
    threading.Thread(target=threading.Event().wait).start()  # interpreter shutdown would wait for it forever
    raise {error}

StopFlag.install = fail
sys.argv = ["main.py"]
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        ("RuntimeError('lost')", 1, "RuntimeError: lost"),
        ("KeyboardInterrupt", 130, ""),
        ("SystemExit(2)", 2, ""),
        ("SystemExit", 0, ""),
    ],
)
def test_any_error_ends_the_process_at_once(error, code, printed):
    program = FAILING_MAIN.format(error=error, path=str(PATH))
    environment = {**os.environ, "PYTHONPATH": str(PATH.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().endswith(printed)
    assert ("Traceback" in done.stderr) == bool(printed)


def test_a_signal_sets_the_flag():
    stop = StopFlag().install()
    assert not stop.is_set
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.is_set
    assert stop.signal_name == "SIGUSR1"


def test_environment_of_a_single_process_is_one_rank():
    environment = {}
    fill_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert int(environment["MASTER_PORT"]) > 0


def test_environment_of_slurm():
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }
    fill_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("5", "16", "1")
    del environment["MASTER_ADDR"]
    with pytest.raises(ConfigError, match="MASTER_ADDR must be set for 16 ranks"):
        fill_environment(environment)


def test_environment_of_a_launcher_is_not_changed():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    before = dict(environment)
    fill_environment(environment)
    assert environment == before
