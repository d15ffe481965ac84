"""Every command of the quickstart runs, in order, on a small folder of videos."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowception.codecs.video_file import read_video, write_video
from tests.docs.test_python import python_blocks
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "quickstart.md"
SMALLER = {"max_steps=2000": "max_steps=3", "--num 4": "--num 1 --num-inference-steps 3 --max-frames 16"}


def commands(page: str) -> list[str]:
    """The lines of all bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture
def folder(tmp_path):
    """A checkout with a folder of videos and an image in it."""
    for name in ("configs", "data_prep", "train", "flowception"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "videos" / "more").mkdir(parents=True)
    rows = np.arange(64)[:, None] + np.zeros((1, 96))
    for number in range(6):
        frames = np.stack([(4 * (rows + number + time)) % 256 for time in range(30)])
        video = np.repeat(frames[..., None], 3, axis=-1).astype(np.uint8)
        write_video(tmp_path / "videos" / ("more" if number % 2 else ".") / f"{number}.mp4", video, fps=12)
    Image.fromarray(video[0]).save(tmp_path / "first.png")
    return tmp_path


@pytest.mark.long
def test_every_command_runs(folder, monkeypatch):
    lines = commands(PAGE.read_text())
    assert lines[:2] == ["make setup", "source .venv/bin/activate"]
    assert all(any(smaller in line for line in lines) for smaller in SMALLER)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the activated environment
    for line in lines[2:]:
        for text, smaller in SMALLER.items():
            line = line.replace(text, smaller)
        line = line.replace("deepspeed ", f"deepspeed --master_port {free_port()} ")
        done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for name in ("shards.png", "curves.png", "clips/contact.png", "clips/clip_0000_growth.png"):
        assert (folder / name).stat().st_size > 0, name
    monkeypatch.chdir(folder)
    for _, code in python_blocks(PAGE.read_text()):
        exec(compile(code.replace("seed=0", "seed=0, num_inference_steps=3, max_frames=16"), str(PAGE), "exec"), {})
    assert read_video(folder / "continued.mp4").shape[1:] == (64, 64, 3)
    assert (folder / "growth.png").stat().st_size > 0
