"""The batch script with stand-ins for Slurm's commands; a real Slurm is not needed."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm/train_2b.sh"


@pytest.fixture
def submit(tmp_path):
    def run(srun_status):
        stands_in = {
            "srun": f'echo "srun $*"; exit {srun_status}',
            "scontrol": '[ "$1" = show ] && echo node1 && echo node2; [ "$1" = requeue ] && echo "requeued $2"; true',
            "sleep": "true",
        }
        for name, lines in stands_in.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        command = ["bash", SCRIPT, "run_dir=r"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    return run


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (85, True), (143, False)])
def test_only_a_run_that_saved_is_requeued(submit, status, requeued):
    job = submit(status)
    assert job.returncode == status, job.stderr
    assert ("requeued 7" in job.stdout) == requeued
    assert "meeting at node1:12007" in job.stdout
    assert job.stdout.count("configs/t2v_2b.yaml run_dir=r") == 1


def test_the_tasks_hear_before_the_limit_and_the_log_goes_on():
    options = [line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(options)
