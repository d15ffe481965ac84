import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flowception.codecs.video_file import write_video
from flowception.evaluation.toy.world import draw_clip

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/score_demo.py"


@pytest.fixture(scope="module")
def script():
    import sys

    spec = importlib.util.spec_from_file_location("score_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["score_demo"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def write_set(folder, clips, task):
    folder.mkdir()
    rows = []
    for number, (video, label) in enumerate(clips):
        write_video(folder / f"clip_{number:04d}.mp4", video, fps=8)
        rows.append({"file": f"clip_{number:04d}.mp4", "task": task, "class_label": label, "frames": len(video)})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    real = [(c.video, c.class_label) for c in (draw_clip(8, k) for k in range(8))]
    generator = np.random.default_rng(0)
    noise = [(generator.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8), k % 4) for k in range(8)]
    return {
        "good": write_set(root / "good", real, "t2v"),
        "noise": write_set(root / "noise", noise, "t2v"),
        # The label of an image-to-video clip is that of its first frame, whatever clips.jsonl says.
        "i2v": write_set(root / "i2v", [(video, -1) for video, _ in real], "i2v"),
        "i2v_noise": write_set(
            root / "i2v_noise", [(np.concatenate([r[0][:1], n[0]]), -1) for r, n in zip(real, noise)], "i2v"
        ),
    }


def run(script, folders, tmp_path, generated, *words, check=True):
    sets = {"real": folders["good"], "generated": folders[generated], "untrained": folders["noise"]}
    arguments = [word for name, folder in sets.items() for word in (f"--{name}", str(folder))]
    return script.main([*arguments, "--json", str(tmp_path / "scores.json"), *["--check"][:check], *words])


@pytest.mark.parametrize(("generated", "code"), [("good", 0), ("i2v", 0), ("noise", 1), ("i2v_noise", 1)])
def test_check_follows_the_promises(script, folders, tmp_path, capsys, generated, code):
    assert run(script, folders, tmp_path, generated) == code
    report = json.loads((tmp_path / "scores.json").read_text())
    assert all(report["promises"].values()) == (code == 0)
    assert report["real"]["color_right"] == 1
    assert report["untrained"]["position_error_px"] is None
    out = capsys.readouterr().out
    assert ("BROKEN" in out) == (code == 1)
    assert "untrained" in out
    assert report["generated"]["single_shape"] == (1 if code == 0 else 0)


def test_without_check_scores_are_printed_without_promises(script, folders, tmp_path, capsys):
    assert run(script, folders, tmp_path, "noise", check=False) == 0
    assert "BROKEN" not in (out := capsys.readouterr().out)
    assert "color right" in out


def test_the_demo_shows_both_tables_and_fails_at_the_end(tmp_path):
    """With fake commands, where the one that scores T2V fails."""
    for folder in ("bin", "benchmarks", "demo/clips"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "benchmarks/demo.sh").write_text((SCRIPT.parent / "demo.sh").read_text())
    for name in ("python", "deepspeed", "flowception"):
        (tmp_path / "bin" / name).write_text('#!/bin/bash\necho "ran $*"\n[[ "$*" != *"$BROKEN"* ]]\n')
        (tmp_path / "bin" / name).chmod(0o755)

    def demo(broken):
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "BROKEN": broken}
        return subprocess.run(
            ["bash", tmp_path / "benchmarks/demo.sh"], env=environment, capture_output=True, text=True, timeout=240
        )

    failed, fine = demo("--picture"), demo("no such word")
    assert (failed.returncode, fine.returncode) == (1, 0)
    for job in (failed, fine):
        assert job.stdout.count("ran benchmarks/score_demo.py") == 2
        assert "Look at:" in job.stdout
    assert demo("train/main.py").stdout.count("score_demo.py") == 0


def test_plot_and_bad_folders(script, folders, tmp_path, capsys):
    assert run(script, folders, tmp_path, "good", "--picture", str(tmp_path / "a" / "scores.png")) == 0
    assert (tmp_path / "a" / "scores.png").stat().st_size > 5000
    (tmp_path / "empty").mkdir()
    assert run(script, {**folders, "noise": tmp_path / "empty"}, tmp_path, "good") == 2
    assert "has no clips" in capsys.readouterr().err
