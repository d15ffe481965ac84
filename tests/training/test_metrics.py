import json
import math
import os
import subprocess
import sys
import types

import pytest

from flowception.errors import ConfigError, MissingDependencyError, RunDirectoryError
from flowception.training.metrics import (
    LoggingConfig,
    MetricsLog,
    Speed,
    check_packages,
    console_line,
    duration,
)


def values(step, loss=1.0):
    return {
        "step": step,
        "loss": loss,
        "loss/velocity": 0.75,
        "loss/insertion": 2.5,
        "clips_per_s": 12.0,
        "tokens_per_s": 3456.0,
        "fill": 0.97,
        "attention_ratio": 0.7,
        "data_wait_s": 0.25,
        "step_s": 1.0,
        "time_left_s": 185.0,
    }


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_object_per_step_and_occasional_console_lines(tmp_path, console):
    log = MetricsLog(tmp_path, LoggingConfig(every_steps=2), max_steps=5, first_step=0)
    for step in range(1, 6):
        log.write(values(step))
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    lines = console.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    for part in (
        "loss 1.0000",
        "12 clips/s",
        "3456 tokens/s",
        "fill 0.970",
        "attention ratio 0.700",
        "wait 25%",
        "3m05s",
    ):
        assert part in lines[0]


def test_resuming_drops_later_steps_and_a_truncated_line(tmp_path):
    log = MetricsLog(tmp_path, LoggingConfig(), 9, 0)
    for step in range(1, 6):
        log.write(values(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    log = MetricsLog(tmp_path, LoggingConfig(), 9, first_step=3)
    log.write(values(4))
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_values_that_are_not_finite_become_null(tmp_path, console):
    log = MetricsLog(tmp_path, LoggingConfig(every_steps=1), 9, 0)
    log.write(values(1, loss=math.nan))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    assert "loss not finite" in console.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (185, "3m05s"), (7620, "2h07m"), (273600, "3d04h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_console_line_shows_the_held_out_loss():
    assert "held-out 0.5000" in console_line(values(1) | {"validation/loss": 0.5}, 2)


def test_speed_predicts_the_time_left(monkeypatch):
    clock = iter([0.0, 0.5, 2.0, 2.25, 4.0, 9.0, 9.5, 10.0])
    monkeypatch.setattr("flowception.training.metrics.time.perf_counter", lambda: next(clock))
    speed = Speed(world_size=2, peak_tflops=None)
    assert speed.lap_s() == 0.5
    first = speed.end_step(clips=10, tokens=100, flops=8e12, steps_left=3)
    rates = {"clips_per_s": 5.0, "tokens_per_s": 50.0, "tflops_per_s": 2.0}  # per rank
    assert first == {"step_s": 2.0, "time_left_s": 6.0, **rates}
    assert speed.lap_s() == 0.25
    assert speed.end_step(clips=10, tokens=100, flops=8e12, steps_left=2)["step_s"] == 2.0
    speed.restart()  # five seconds of saving do not count as data wait
    assert speed.lap_s() == 0.5
    assert speed.end_step(clips=10, tokens=100, flops=8e12, steps_left=1)["step_s"] == 1.0


def test_mfu_is_the_flops_of_a_rank_over_its_peak(monkeypatch):
    clock = iter([0.0, 4.0])
    monkeypatch.setattr("flowception.training.metrics.time.perf_counter", lambda: next(clock))
    found = Speed(world_size=2, peak_tflops=100.0).end_step(clips=1, tokens=1, flops=320e12, steps_left=1)
    assert (found["tflops_per_s"], found["mfu"], found["peak_tflops"]) == (40.0, 0.4, 100.0)
    line = console_line(values(1) | found, 2)
    assert "MFU 40.0%" in line


def test_console_line_shows_the_calibration_of_the_rate():
    assert "rate 0.75 of true" in console_line(values(1) | {"rate/predicted": 3.0, "rate/true": 4.0}, 2)
    assert "of true" not in console_line(values(1) | {"rate/predicted": 3.0, "rate/true": 0.0}, 2)


@pytest.fixture
def fake_wandb(monkeypatch):
    """Records the calls of ``wandb.init`` and ``log``; set ``key`` to simulate a stored login."""
    seen = {"key": False}
    run = types.SimpleNamespace(
        log=lambda values: seen.update({values["step"]: values}),
        finish=lambda: None,
        define_metric=lambda name, step_metric: seen.update({"step_metric": (name, step_metric)}),
    )
    fake = types.SimpleNamespace(
        init=lambda **arguments: seen.update(arguments) or run, login=lambda prompt, verify: seen["key"]
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return seen


@pytest.mark.parametrize(("key", "mode"), [(False, "offline"), (True, None)])
def test_wandb_is_offline_without_a_key(tmp_path, fake_wandb, key, mode):
    fake_wandb["key"] = key
    log = MetricsLog(tmp_path, LoggingConfig(wandb_project="p"), 9, 0)
    log.write(values(1))
    log.close()
    assert (fake_wandb["project"], fake_wandb["name"], fake_wandb["mode"]) == ("p", tmp_path.name, mode)
    assert fake_wandb[1]["loss"] == 1.0
    assert fake_wandb["step_metric"] == ("*", "step")


def test_a_full_disk_warns_once_and_the_run_continues(tmp_path, console):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path, LoggingConfig(every_steps=1), 9, 0)
    for step in (1, 2, 3):
        log.write(values(step))
    log.close()
    out = console.readouterr().out
    assert out.count("WARNING: cannot write metrics.jsonl") == 1
    assert "step 3/9" in out


def test_a_log_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunDirectoryError, match="metrics.jsonl"):
        MetricsLog(tmp_path, LoggingConfig(), 9, 0)


def test_wandb_separates_runs_with_the_same_name_and_continues_a_resumed_one(tmp_path, fake_wandb):
    ids = []
    for folder in ("a/run", "b/run", "a/run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        MetricsLog(tmp_path / folder, LoggingConfig(wandb_project="p"), 9, 0).close()
        ids.append(fake_wandb["id"])
    assert ids[0] == ids[2] != ids[1]
    assert fake_wandb["resume"] == "allow"


def test_a_missing_wandb_is_an_error_before_anything_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_packages(LoggingConfig())
    with pytest.raises(MissingDependencyError, match="wandb"):
        check_packages(LoggingConfig(wandb_project="p"))


ASK_WANDB = """
import os, wandb
from flowception.training.metrics import _has_api_key
print("KEY", _has_api_key(wandb), flush=True)
os._exit(0)  # at exit, wandb's service would wait for a server that this machine cannot reach
"""


@pytest.mark.long
@pytest.mark.parametrize("has_key", [False, True])
def test_the_real_wandb_reports_whether_there_is_a_key(tmp_path, has_key):
    pytest.importorskip("wandb")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine wandb.example login user password {'0' * 40}\n" if has_key else "")
    netrc.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"NETRC": str(netrc), "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example"}
    asked = subprocess.run(
        [sys.executable, "-c", ASK_WANDB], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert f"KEY {has_key}" in asked.stdout, asked.stderr


def test_wandb_stays_offline_if_configured(tmp_path, fake_wandb, console, monkeypatch):
    fake_wandb["key"] = True
    monkeypatch.setenv("WANDB_MODE", "online")
    MetricsLog(tmp_path, LoggingConfig(wandb_project="p", wandb_offline=True), 9, 0).close()
    assert fake_wandb["mode"] == "offline"
    assert "offline (logging.wandb_offline is set)" in console.readouterr().out


def test_config_out_of_range_is_an_error():
    with pytest.raises(ConfigError, match="logging.peak_tflops"):
        LoggingConfig(peak_tflops=0.0)
    with pytest.raises(ConfigError, match="logging.every_steps"):
        LoggingConfig(every_steps=0)


KILLED_SERVICE = """
import os, pathlib, psutil, sys
from flowception.progress import show_log
from flowception.training.metrics import LoggingConfig, MetricsLog
show_log()
folder = pathlib.Path(sys.argv[1])
log = MetricsLog(folder, LoggingConfig(wandb_project="p", wandb_offline=True), 9, 0)
children = psutil.Process().children(recursive=True)
assert children, "wandb started no process"
for child in children:
    child.terminate()
psutil.wait_procs(children, timeout=60)
for step in (1, 2):
    log.write({"step": step, "loss": 1.0, "loss/velocity": 1.0, "loss/insertion": 1.0, "clips_per_s": 1.0,
               "tokens_per_s": 1.0, "fill": 1.0, "attention_ratio": 1.0, "data_wait_s": 0.0, "step_s": 1.0,
               "time_left_s": 1.0})
log.close()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.long
def test_a_signal_to_the_wandb_service_does_not_end_the_run(tmp_path):
    """Slurm sends SIGTERM to every process of a task."""
    pytest.importorskip("wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SERVICE, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING: wandb failed") == 1
    assert steps_in(tmp_path) == [1, 2]


def test_a_wandb_that_does_not_start_does_not_end_the_run(tmp_path, fake_wandb, monkeypatch, console):
    def init(**arguments):
        raise TimeoutError("no network")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    log = MetricsLog(tmp_path, LoggingConfig(wandb_project="p"), 9, 0)
    log.write(values(1))
    log.close()
    assert "WARNING: wandb failed (no network); the run continues" in console.readouterr().out
