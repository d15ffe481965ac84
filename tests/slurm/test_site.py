"""``slurm/site.sh`` as a site would edit it, sourced without Slurm."""

import subprocess
from pathlib import Path

SITE = Path(__file__).resolve().parents[2] / "slurm/site.sh"


def test_a_sourced_copy_sets_what_sbatch_and_the_jobs_read(tmp_path):
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
