import json
from pathlib import Path

import pytest
import torch

from flowception.errors import ConfigError
from flowception.progress import show_log
from flowception.training.config import load_config
from flowception.training.profiler import ProfileConfig, StepProfiler
from tests.distributed_worker import run_distributed
from tests.training.workers.toy_set import write_set

WORKER = "tests.training.workers.trainer_worker"
ROOT = Path(__file__).parents[2]


def matmuls(path):
    """Number of matrix products of ``products`` in a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


def run_steps(profiler, steps):
    """Step s has s matrix products."""
    x = torch.ones(8, 8)
    for step in range(1, steps + 1):
        for _ in range(step):
            x = x.mm(x).clamp(max=1)
        profiler.end_step(step)


def test_the_trace_has_exactly_the_active_steps(tmp_path, console):
    show_log(rank=3)
    config = ProfileConfig(wait_steps=2, warmup_steps=1, active_steps=2, ranks=[1, 3])
    profiler = StepProfiler(config, tmp_path, rank=3)
    run_steps(profiler, 7)
    profiler.close()
    (trace,) = (tmp_path / "profile").glob("*.json")
    assert trace.name == "rank_00003_step_00000005.json"
    assert matmuls(trace) == 4 + 5
    assert "aten::mm" in trace.with_suffix(".txt").read_text()
    assert console.readouterr().out == f"profile of rank 3: {trace}, slowest operators in {trace.stem}.txt\n"


@pytest.mark.parametrize("config", [ProfileConfig(), ProfileConfig(wait_steps=0, warmup_steps=0, active_steps=1)])
def test_nothing_is_written_if_off_or_for_other_ranks(tmp_path, config):
    profiler = StepProfiler(config, tmp_path, rank=1)
    run_steps(profiler, 4)
    profiler.close()
    assert not (tmp_path / "profile").exists()


def test_a_job_that_ends_early_writes_a_partial_trace(tmp_path):
    profiler = StepProfiler(ProfileConfig(wait_steps=0, warmup_steps=1, active_steps=9), tmp_path, rank=0)
    run_steps(profiler, 3)
    profiler.close()
    (trace,) = (tmp_path / "profile").glob("*.json")
    assert matmuls(trace) == 2 + 3


def test_an_unwritable_folder_is_a_warning(tmp_path, console):
    (tmp_path / "profile").write_text("a file")
    profiler = StepProfiler(ProfileConfig(wait_steps=0, warmup_steps=1, active_steps=1), tmp_path, 0)
    run_steps(profiler, 3)
    (line,) = console.readouterr().out.splitlines()
    assert line.startswith(f"WARNING: cannot write the profile {tmp_path / 'profile'}/rank_00000_step_00000002.json (")


def test_invalid_settings_are_errors():
    wrong = ({"active_steps": 0}, {"wait_steps": -1}, {"warmup_steps": -1}, {"ranks": []}, {"ranks": [-1]})
    for change in wrong:
        with pytest.raises(ConfigError, match=f"profile.{next(iter(change))}"):
            ProfileConfig(**change)
    with pytest.raises(ConfigError, match="from 0 to 1, got .* and 2 ranks"):
        ProfileConfig(active_steps=1, ranks=[0, 2]).check_world_size(2)
    ProfileConfig(ranks=[9]).check_world_size(2)


@pytest.mark.xdist_group("runs")
def test_profiling_does_not_change_a_run(tmp_path):
    write_set(tmp_path / "shards")
    changes = {"profile__wait_steps": 1, "profile__warmup_steps": 1, "profile__active_steps": 1, "max_steps": 4}
    run_distributed(WORKER, "one_run", 1, folder=str(tmp_path), name="profiled", **changes)
    (trace,) = (tmp_path / "profiled/profile").glob("*.json")
    assert trace.name == "rank_00000_step_00000003.json"
    assert "attention" in (text := trace.with_suffix(".txt").read_text()), text
    assert (tmp_path / "profiled/metrics.jsonl").read_text().count("\n") == 4


def test_the_overlay_profiles_any_recipe():
    files = [ROOT / "configs/t2v_2b.yaml", ROOT / "configs/overlays/profile.yaml"]
    config = load_config(files, ["data.path=x", "run_dir=y", "max_steps=16"])
    profile = config.profile
    assert profile.active_steps is not None
    assert profile.wait_steps + profile.warmup_steps + profile.active_steps < 16
