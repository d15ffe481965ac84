"""The job array on a real Slurm: two of four tasks are killed and run again, with the same result."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.encoder import ShardEncoder
from data_prep.make_toy import make_toy

VIDEOS, DISTINCT, PARTS, VIDEOS_PER_SHARD = 5000, 250, 4, 50
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm/encode_shards.sh"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """5,000 video files, 250 of them different."""
    folder = tmp_path_factory.mktemp("videos")
    rows = [json.loads(line) for line in make_toy(folder, clips=DISTINCT, seed=9).read_text().splitlines()]
    with (folder / "all.jsonl").open("w") as manifest:
        for number in range(VIDEOS):
            row, name = rows[number % DISTINCT], f"video_{number:05d}.mp4"
            os.link(folder / row["path"], folder / name)
            manifest.write(json.dumps(row | {"path": name}) + "\n")
    return folder / "all.jsonl"


def finished_shards(folder):
    return {int(path.name[6:12]) for path in folder.glob("shard-*.index.npz")}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".lock"}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("slurm")
def test_a_job_array_with_two_killed_tasks_makes_the_bytes_of_one_process(slurm_cluster, videos, tmp_path):
    out, logs = tmp_path / "array", f"--output={tmp_path}/task-%a.log"
    words = ["--config", "configs/encode_toy.yaml", f"source={videos}", f"out={out}"]
    words.append(f"videos_per_shard={VIDEOS_PER_SHARD}")
    batch = [f"--array=0-{PARTS - 1}", "--cpus-per-task=1", logs, SCRIPT, *words]
    job = slurm_cluster.submit(*batch)
    draws = random.Random(0)
    kill_after = {task: draws.randint(1, 3) for task in draws.sample(range(PARTS), 2)}  # of 25, so most work remains
    print(f"killing tasks after shards: {kill_after}")
    chosen, deadline = set(kill_after), time.monotonic() + 240
    while kill_after:
        assert time.monotonic() < deadline, f"tasks {kill_after} have not done so many shards"
        done = [k % PARTS for k in finished_shards(out)]
        for task in [task for task, shards in kill_after.items() if done.count(task) >= shards]:
            slurm_cluster.run("scancel", "--signal=KILL", f"{job}_{task}")
            del kill_after[task]
        time.sleep(0.02)
    states = slurm_cluster.wait(job, 300)
    assert {int(task) for task, state in states.items() if state != "COMPLETED"} == chosen, states
    done = finished_shards(out)
    assert {k % PARTS for k in set(range(VIDEOS // VIDEOS_PER_SHARD)) - done} == chosen
    assert not (out / "meta.json").exists()
    status = subprocess.run(
        [sys.executable, "data_prep/encode_shards.py", *words, "--status"],
        cwd=ROOT, env=slurm_cluster.environment, capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert f"shards: {len(done)} of 100 done, 0 running" in status
    assert "clips/s" in status
    assert "nothing is running" in status
    untouched = {k: (out / f"shard-{k:06d}.tar").stat().st_mtime_ns for k in done}

    again = slurm_cluster.submit(*batch)
    assert set(slurm_cluster.wait(again, 300).values()) == {"COMPLETED"}, (tmp_path / "task-0.log").read_text()
    assert {k: (out / f"shard-{k:06d}.tar").stat().st_mtime_ns for k in done} == untouched
    whole = EncodeConfig(
        source=str(videos), out=str(tmp_path / "whole"), height=16, width=16, videos_per_shard=VIDEOS_PER_SHARD
    )
    assert ShardEncoder(whole).run().clips == VIDEOS
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_partial_array_is_an_error(tmp_path):
    """Without Slurm: tasks 3 and 7 of a partial array would encode the wrong shards."""
    environment = {**os.environ, "FLOWCEPTION_HOME": str(ROOT), "FLOWCEPTION_SITE": os.devnull}
    environment |= {f"SLURM_ARRAY_TASK_{name}": value for name, value in
                    (("COUNT", "2"), ("MIN", "3"), ("MAX", "7"), ("ID", "3"))}  # fmt: skip
    environment |= {"SLURM_ARRAY_JOB_ID": "5", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "srun").write_text('#!/bin/bash\necho "srun $*"\n')
    (tmp_path / "srun").chmod(0o755)
    command = ["bash", str(SCRIPT), "--config", "c.yaml"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert refused.returncode == 2
    assert "set NUM_PARTS" in refused.stderr
    allowed = subprocess.run(
        command, env={**environment, "NUM_PARTS": "16"}, capture_output=True, text=True, timeout=240, check=True
    )
    assert "data_prep/encode_shards.py --config c.yaml part=3 num_parts=16" in allowed.stdout
