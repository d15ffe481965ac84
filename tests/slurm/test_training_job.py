"""``slurm/train_2b.sh`` on a real two-node Slurm: preempted, requeued, canceled, a rank lost. The result is the same.

A time limit sends the same signal as the first test (``--signal=USR1@300`` and ``scancel --signal=USR1`` both reach the
tasks and not the script). Slurm counts limits in minutes, so no test waits for one.
"""

import os
import signal

import pytest

from flowception.codecs import CodecConfig, build_codec
from flowception.generation.generate import GenerateOptions, generate
from tests.slurm.training_job import TrainingJob
from tests.training.workers.toy_set import write_set

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500), pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    fingerprint = build_codec(CodecConfig(name="patchify", patch_size=2)).fingerprint()
    return write_set(tmp_path_factory.mktemp("toy") / "shards", codec_fingerprint=fingerprint, channels=12)


@pytest.fixture
def job(slurm_cluster, data, tmp_path):
    job = TrainingJob(slurm_cluster, tmp_path, data)
    yield job
    if job.number and job.record("JobState") in ("PENDING", "RUNNING"):
        slurm_cluster.run("scancel", job.number)
        job.wait_for_end()


def test_a_preempted_job_is_requeued_and_ends_like_an_uninterrupted_one(slurm_cluster, job):
    job.submit()
    job.wait_for_steps(2)
    step = slurm_cluster.run("scontrol", "--oneliner", "show", "step", f"{job.number}.0")
    assert "NodeList=node[1-2]" in step
    assert "Tasks=2" in step
    job.wait_for_text("2 ranks x 2 packs of 96 tokens, ZeRO-3, bf16")

    with job.nodes_drained():
        slurm_cluster.run("scancel", "--signal=USR1", job.number)
        job.wait_until_requeued(1)
        assert job.text().count("Exited with exit code 85") == 2, job.text()
        assert f"job {job.number} stopped by a signal and saved; requeueing" in job.text()
        first = job.newest_checkpoint()
        assert first == job.steps_done() >= 2, "a step was done and not saved"

    job.wait_for_steps(first + 2)
    with job.nodes_drained():
        slurm_cluster.run("scontrol", "requeue", job.number)
        job.wait_until_requeued(2)
        second = job.newest_checkpoint()
        assert second == job.steps_done() >= first + 2, f"a step was done and not saved\n{job.text()[-6000:]}"
        assert "stopped by SIGTERM" in job.text()
        job.set_max_steps(second + 3)

    assert job.wait_for_end() == "COMPLETED", job.text()[-6000:]
    text = job.text()
    assert [f"job {job.number}, start {start}: 2 ranks on node[1-2]" in text for start in (0, 1, 2)] == [True] * 3
    assert [f"resuming {job.run_dir} at step {step} of" in text for step in (first, second)] == [True] * 2
    assert f"step {second + 3} of {second + 3}: complete" in text
    assert job.metric_steps() == list(range(1, second + 4))
    assert job.hash_of() == job.run_uninterrupted(second + 3)
    assert len(job.hash_of().splitlines()) == 3


def test_a_lost_rank_requeues_the_job_and_a_canceled_one_saves(slurm_cluster, job):
    job.submit(SLURM_WAIT="3")
    job.wait_for_checkpoint(3)
    ranks = job.rank_processes()
    assert set(ranks) == {0, 1}
    with job.nodes_drained():
        os.kill(ranks[0], signal.SIGSTOP)  # as in a collective that the other rank never joins: only Slurm can end it
        os.kill(ranks[1], signal.SIGKILL)
        job.wait_until_requeued(1)
        saved = job.newest_checkpoint()
        assert saved >= 3
        assert f"exit code 137, newest checkpoint: {saved} (at its start: -1); requeueing" in job.text()

    job.wait_for_checkpoint(saved + 3)
    job.wait_for_text(f"resuming {job.run_dir} at step {saved} of")
    slurm_cluster.run("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    assert job.record("Restarts") == "1"
    assert job.text().count("requeueing") == 1
    assert "stopped by SIGTERM" in job.text()
    last = job.newest_checkpoint()
    assert last == job.steps_done() >= saved + 3, f"a step was done and not saved\n{job.text()[-6000:]}"
    assert job.metric_steps() == list(range(1, last + 1))
    assert job.hash_of() == job.run_uninterrupted(last)


def test_a_job_array_generates_the_set_of_one_process(slurm_cluster, job, tmp_path):
    """Five clips in batches of two, on two tasks."""
    job.run_uninterrupted(1)
    run_dir, out = job.folder / "uninterrupted", tmp_path / "array"
    requests = {"num": 5, "batch_size": 2, "num_inference_steps": 3, "max_frames": 8, "seed": 11}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in requests.items()]
    logs = f"--output={tmp_path}/task-%a.log"
    sizes = ["--array=0-1", "--cpus-per-task=1", logs]
    array = slurm_cluster.submit(*sizes, "slurm/generate.sh", run_dir, *words, f"--out={out}")
    states = slurm_cluster.wait(array, 400)
    texts = [(tmp_path / f"task-{task}.log").read_text() for task in (0, 1)]
    assert states == {"0": "COMPLETED", "1": "COMPLETED"}, texts
    assert ["wrote 3 clips" in texts[0], "wrote 2 clips" in texts[1]] == [True, True], texts
    generate(GenerateOptions(run_dir=run_dir, out_dir=tmp_path / "one", device="cpu", **requests))
    compared = ["clips.jsonl", *(f"clip_{number:04d}.gif" for number in range(5))]  # H.264 is not always deterministic
    for name in compared:
        assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert len(list(out.glob("clip_*.mp4"))) == 5
