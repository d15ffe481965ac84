"""The batch script with stand-ins for Slurm's commands, without a real Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm/train_2b.sh"


@pytest.fixture
def submit(tmp_path):
    """Run the script, given the exit status of the tasks and the newest checkpoint before and after them."""

    def run(srun_status, before=-1, after=-1, **environment):
        newest = tmp_path / "newest"
        newest.write_text(f"{before}\n")
        stands_in = {
            "srun": f'echo "srun $*"; echo {after} > {newest}; exit {srun_status}',
            "scontrol": '[ "$1" = show ] && echo node1 && echo node2; [ "$1" = requeue ] && echo "requeued $2"; true',
            "sleep": "true",
            "python": f'echo "python $*" >> {tmp_path}/python.log; cat {newest}',
        }
        for name, lines in stands_in.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
            (tmp_path / name).chmod(0o755)
        site = tmp_path / "site.sh"
        site.write_text('echo "a module says hello $NOT_SET"\n')
        variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
        variables |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        variables |= {"FLOWCEPTION_HOME": str(tmp_path), "FLOWCEPTION_SITE": str(site), **environment}
        command = ["bash", SCRIPT, "run_dir=r"]
        job = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
        assert job.returncode == srun_status, job.stderr
        return job.stdout

    return run


def requeued(text):
    return "requeued 7" in text


@pytest.mark.parametrize("status", [0, 2, 130, 143])
def test_intended_or_permanent_exits_are_not_requeued(submit, status):
    assert not requeued(submit(status, before=3, after=6))


@pytest.mark.parametrize("status", [85, 86, 137, 1])
def test_any_other_exit_is_requeued(submit, tmp_path, status):
    text = submit(status)
    assert requeued(text)
    assert "meeting at node1:12007" in text
    assert text.count("configs/t2v_2b.yaml run_dir=r") == 1
    asked = f"python train/main.py --newest-step --config {tmp_path}/configs/t2v_2b.yaml run_dir=r\n"
    assert (tmp_path / "python.log").read_text() == asked * (1 if status == 85 else 2)


def test_a_repeated_failure_is_given_up(submit, tmp_path):
    assert [requeued(submit(137, 6, 6)) for _ in range(3)] == [True, True, True]
    text = submit(86, 6, 6)
    assert not requeued(text)
    assert "failed with exit code 86, newest checkpoint: 6 (at its start: 6); failed 4 times in a row" in text
    assert not list(tmp_path.glob("*.failures"))
    assert requeued(submit(1, 6, 6)), "started again by a person, it is tried as often as a new one"
    assert not requeued(submit(1, 6, 6, MAX_FAILURES="1"))


@pytest.mark.parametrize(("status", "after"), [(137, 9), (85, 6)])
def test_progress_or_a_save_resets_the_count(submit, tmp_path, status, after):
    for _ in range(3):
        assert requeued(submit(1, 6, 6))
    assert requeued(submit(status, 6, after))
    assert not list(tmp_path.glob("*.failures"))
    assert [requeued(submit(1, after, after)) for _ in range(4)] == [True, True, True, False]


def test_without_a_checkpoint_a_failure_counts_as_no_progress(submit, tmp_path):
    text = submit(1, "", "", FLOWCEPTION_SITE=str(tmp_path / "nowhere.sh"))
    assert "newest checkpoint: -1 (at its start: -1); requeueing" in text
    assert (tmp_path / "flowception-7.failures").read_text() == "1\n"


def test_tasks_get_a_signal_before_the_limit_and_the_log_is_appended():
    options = [line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append", "--mem=0"} <= set(options)
