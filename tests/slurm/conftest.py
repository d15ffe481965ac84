"""A real two-node Slurm on this machine, started for the tests that use it and stopped after them."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
NODES = 2
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


@dataclass(frozen=True)
class SlurmCluster:
    """Two nodes with two CPUs and one fake GPU each."""

    environment: dict[str, str]
    """For Slurm's commands and for jobs: this interpreter, this checkout."""

    def run(self, *command, timeout_s=240, **environment):
        """Output of one of Slurm's commands; an error is a failed test that shows it."""
        variables, words = {**self.environment, **environment}, list(map(str, command))
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def submit(self, *words, **environment) -> int:
        """Number of the job that ``sbatch WORDS`` starts."""
        return int(self.run("sbatch", "--parsable", *words, **environment).strip())

    def states(self, job: int) -> dict[str, str]:
        """State of each task of a job: by number in the array, or by the job's number."""
        records = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        found = {}
        for record in records:
            number = re.search(r"ArrayTaskId=(\S+)", record) or re.search(r"JobId=(\d+)", record)
            found[number.group(1)] = re.search(r"JobState=(\w+)", record).group(1)
        return found

    def wait(self, job: int, timeout_s: float) -> dict[str, str]:
        """States when every task of a job has ended."""
        deadline = time.monotonic() + timeout_s
        states = self.states(job)
        while not ENDED.issuperset(states.values()):
            assert time.monotonic() < deadline, f"job {job} is {states} after {timeout_s} s"
            time.sleep(0.2)
            states = self.states(job)
        return states


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory):
    """A ``SlurmCluster``. If Slurm is not found and cannot be installed, the test fails with the reason."""
    folder = tmp_path_factory.mktemp("slurm")
    settings = {"NODES": str(NODES), "CPUS": "2", "GPUS": "1", "PORT": str(free_ports(NODES + 1))}
    environment = {**os.environ, **settings}
    started = subprocess.run(
        ["bash", SCRIPT, "up", folder], env=environment, capture_output=True, text=True, timeout=280
    )
    try:
        if started.returncode != 0:
            pytest.fail(
                "no Slurm for this test: it needs root and Debian's slurmctld, slurmd, slurm-client and munge "
                f"(apt-get install them):\n{started.stdout}{started.stderr}"
            )
        site = folder / "site.sh"
        site.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH" OMP_NUM_THREADS=1\n')
        ours = {"FLOWCEPTION_HOME": str(ROOT), "FLOWCEPTION_SITE": str(site), "OMP_NUM_THREADS": "1"}
        ours |= {"DS_ACCELERATOR": "cpu"}
        yield SlurmCluster({**os.environ, "SLURM_CONF": started.stdout.split()[-1], **ours})
    finally:
        subprocess.run(["bash", SCRIPT, "down", folder], timeout=240, check=False)
