"""``slurm/site.sh`` as a site would edit it, sourced without Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "slurm"
SITE = SLURM / "site.sh"


def test_a_sourced_copy_sets_the_variables_of_sbatch_and_the_jobs(tmp_path):
    activate = tmp_path / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("export ACTIVATED=yes\n")
    mine = tmp_path / "site.mine.sh"
    lines = (
        SITE.read_text()
        .replace("# export SBATCH", "export SBATCH")
        .replace("# export NCCL_SOCKET", "export NCCL_SOCKET")
    )
    mine.write_text(lines)
    shown = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "source ./site.mine.sh; env"],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True, timeout=240,
    ).stdout.splitlines()  # fmt: skip
    expected = {"FLOWCEPTION_SITE": mine, "FLOWCEPTION_HOME": tmp_path, "SBATCH_PARTITION": "gpu"}
    expected |= {"SBATCH_ACCOUNT": "me", "NCCL_SOCKET_IFNAME": "ib0", "ACTIVATED": "yes", "OMP_NUM_THREADS": "4"}
    assert {f"{name}={value}" for name, value in expected.items()} <= set(shown)


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ("train_2b.sh", "train/main.py --config"),
        ("generate.sh", "flowception.cli generate"),
        ("encode_shards.sh", "data_prep/encode_shards.py"),
    ],
)
def test_a_site_may_read_unset_variables(tmp_path, script, program):
    """Modules and conda do that. The stand-in for srun runs one task."""
    stands_in = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo node1",
        "python": 'echo "python $*, site says $SAID"',
    }
    for name, lines in stands_in.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slurm").symlink_to(SLURM)
    (tmp_path / "site.sh").write_text("export SAID=hello$NOT_SET_BY_ANYBODY\n")
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FLOWCEPTION_HOME": str(tmp_path)}
    variables |= {"FLOWCEPTION_SITE": str(tmp_path / "site.sh"), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    variables |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    variables |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
    variables |= {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "0"}
    job = subprocess.run(
        ["bash", SLURM / script, "word"], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert job.returncode == 0, job.stderr
    assert program in job.stdout
    assert "word" in job.stdout
    assert "site says hello" in job.stdout
