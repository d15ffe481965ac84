"""A training job on the test cluster: submit the production script, follow it, and do the same run without Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

import yaml

from flowception.checkpoint.format import list_steps
from tests.distributed_worker import end_all, rank_environment
from tests.fork_server import Server, run_python
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm/train_2b.sh"
NEVER = 1_000_000
"""``max_steps`` of a job that must not complete."""
PATIENCE_S = 400
"""Timeout for anything that takes ten seconds on an idle machine."""
OVERLAY = {
    "token_budget": 96,
    "packs_per_step": 3,
    "model": {"in_channels": 12, "text_dim": 0, "num_classes": 2, "compile": "off"},
    "data": {"num_workers": 1, "heldout_fraction": 0.2},
    "checkpoint": {"save_every_steps": 3, "keep_every_steps": None},
    "validation": {"every_steps": 5, "num_clips": 4},
    "logging": {"every_steps": 1},
}
"""Over ``configs/t2v_2b.yaml`` for the toy set; the rest is as in production: ZeRO-3, bf16, as many
blocks kept as fit."""


class TrainingJob:
    """One run directory and the Slurm job that works on it."""

    def __init__(self, cluster, folder: Path, data: Path):
        self.cluster, self.folder = cluster, folder
        self.run_dir, self.log, self.number = folder / "run", folder / "job.log", 0
        self.words = [f"{folder}/overlay.yaml", "model.preset=toy", f"data.path={data}", f"run_dir={self.run_dir}"]
        self.set_max_steps(NEVER)

    def set_max_steps(self, value: int):
        """Set for the job's next start, when it reads its files."""
        (self.folder / "overlay.yaml").write_text(yaml.safe_dump({"max_steps": value, **OVERLAY}))

    def submit(self, **environment):
        sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        self.number = self.cluster.submit(*sizes, f"--output={self.log}", SCRIPT, *self.words, **environment)

    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def metric_steps(self) -> list[int]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []

    def steps_done(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def record(self, key: str) -> str:
        found = re.search(rf"\b{key}=(\w+)", self.cluster.run("scontrol", "--oneliner", "show", "job", self.number))
        return found.group(1)

    def wait_until(self, happened, what: str, allowed=("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")):
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            state = self.record("JobState")
            assert state in allowed, f"{what}: the job is {state}\n{self.text()[-6000:]}"
            assert time.monotonic() < deadline, f"{what}: not in {PATIENCE_S} s, {state}\n{self.text()[-6000:]}"
            time.sleep(0.1)

    def wait_for_steps(self, count: int):
        """Wait until the run has done this many steps."""
        self.wait_until(lambda: self.steps_done() >= count, f"waiting for step {count}")

    def wait_for_checkpoint(self, step: int):
        """Wait until the run has saved this step or a later one; saves run in the background."""
        self.wait_until(lambda: self.newest_checkpoint() >= step, f"waiting for a checkpoint of step {step}")

    def wait_for_text(self, text: str):
        """Wait until the log has the text; output of ranks arrives through ``srun``, later than their files."""
        self.wait_until(lambda: text in self.text(), f"waiting for {text!r} in the log")

    def wait_until_requeued(self, restarts: int):
        def waits():
            return (self.record("JobState"), self.record("Restarts")) == ("PENDING", str(restarts))

        self.wait_until(waits, f"waiting for requeue {restarts}")

    def wait_for_end(self) -> str:
        (state,) = self.cluster.wait(self.number, PATIENCE_S).values()
        return state

    @contextlib.contextmanager
    def nodes_drained(self):
        """Drain the cluster: no job starts inside the block, and running ones continue."""
        self.cluster.run("scontrol", "update", "nodename=node[1-2]", "state=drain", "reason=test")
        try:
            yield
        finally:
            self.cluster.run("scontrol", "update", "nodename=node[1-2]", "state=resume")

    def rank_processes(self) -> dict[int, int]:
        """Rank to process id of the training processes, without their DataLoader workers."""
        parents, ranks = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = dict(
                    word.split("=", 1) for word in (folder / "environ").read_text().split("\0") if "=" in word
                )
                mine = environment.get("SLURM_JOB_ID") == str(self.number) and "RANK" in environment
                if mine and "train/main.py" in (folder / "cmdline").read_text():
                    ranks[int(folder.name)] = int(environment["RANK"])
                    parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        return {rank: pid for pid, rank in ranks.items() if parents[pid] not in ranks}

    def newest_checkpoint(self) -> int:
        return max(list_steps(self.run_dir), default=-1)

    def run_uninterrupted(self, steps: int) -> str:
        """Run the same training in two processes without Slurm, and return its hash."""
        run_dir, port, server = self.folder / "uninterrupted", free_port(), Server.shared()
        words = ["train/main.py", "--config", "configs/t2v_2b.yaml", *self.words]
        words += [f"run_dir={run_dir}", f"max_steps={steps}"]
        environments = [rank_environment(rank, 2, port) | {"PYTHONPATH": str(ROOT)} for rank in range(2)]
        log = self.folder / "uninterrupted.log"
        processes = [server.start_python(words, environment, log) for environment in environments]
        try:
            codes = [process.wait(PATIENCE_S) for process in processes]
        finally:
            end_all(processes)
        assert codes == [0, 0], (self.folder / "uninterrupted.log").read_text()[-4000:]
        return self.hash_of(run_dir)

    def hash_of(self, run_dir: Path | None = None) -> str:
        """Output of ``flowception checkpoint RUN --hash``."""
        words = ["-m", "flowception.cli", "checkpoint", run_dir or self.run_dir, "--hash"]
        done = run_python(words, os.environ | {"PYTHONPATH": str(ROOT)}, PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout
