"""A run on an MDS set from the command line: training with samples, then clips from prompts and from context."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowception.codecs.video_file import read_header, read_video
from flowception.shards.mds import MdsReader
from tests.training.workers.toy_set import read_metrics

ROOT = Path(__file__).resolve().parents[2]
FPS = 6
"""Only the set has this value: it differs from the toy videos' and from the default of generation."""

pytestmark = [pytest.mark.long, pytest.mark.mds]


def command(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.timeout(900)
def test_a_run_on_an_mds_set_samples_and_generates(tmp_path):
    clips, encoder, tars, mds, run = (tmp_path / name for name in ("clips", "encoder", "tars", "mds", "run"))
    command("data_prep/make_toy.py", "--out", clips, "--clips", 24)
    command("data_prep/make_toy_text_encoder.py", "--out", encoder)
    command(
        "data_prep/encode_shards.py", "--config", "configs/encode_toy.yaml", "configs/encode_toy_text.yaml",
        f"source={clips / 'manifest.jsonl'}", f"out={tars}", f"text.model={encoder}", f"fps={FPS}",
    )  # fmt: skip
    command("data_prep/convert_shards.py", "--source", tars, "--out", mds, "--shard-bytes", 100_000)
    shutil.rmtree(tars)
    shutil.rmtree(clips)
    reader = MdsReader(mds)
    assert (len(reader.meta.shards) > 1, reader.text_width) == (True, 32)
    command(
        "train/main.py", "--config", "configs/demo.yaml", "configs/demo_text.yaml", f"run_dir={run}",
        f"data.path={mds}", "tasks={t2v: 0.5, i2v: 0.5}", "max_steps=3", "optim.warmup_steps=1", "ema.decay=0.8",
        "checkpoint.save_every_steps=3", "data.heldout_fraction=0.2", "validation.every_steps=3", "zero.stage=0",
        "samples.every_steps=3", "samples.num_clips=2", "samples.num_inference_steps=3", "samples.max_frames=6",
    )  # fmt: skip
    lines = read_metrics(run)
    assert sum("loss" in line for line in lines) == 3
    sampled = sorted((run / "samples").rglob("*.mp4"))
    assert len(sampled) == 2
    out = {name: tmp_path / name for name in ("plain", "prompted", "continued")}
    generate = ("-m", "flowception.cli", "generate", run, "--num", 2, "--num-inference-steps", 4, "--max-frames", 6)
    prompt = ("--prompt", "a red disc moving left and up", "--guidance", 2)
    command(*generate, "--out", out["plain"])
    command(*generate, "--out", out["prompted"], *prompt)
    context = out["plain"] / "clip_0000.mp4"
    command(*generate, "--out", out["continued"], *prompt, "--task", "i2v", "--context", context)
    made = {name: sorted(folder.glob("clip_*.mp4")) for name, folder in out.items()}
    for path in (*sampled, *made["plain"], *made["prompted"], *made["continued"]):
        assert read_header(path).fps == FPS, path
        assert read_video(path).shape[1:] == (16, 16, 3)
    assert [len(paths) for paths in made.values()] == [2, 2, 2]
