"""The generate job from run directory to files."""

import json

import numpy as np
import pytest
from PIL import Image

from flowception.codecs.video_file import read_video, write_video
from flowception.errors import ConfigError
from flowception.flow.delays import PRESCRIBED_LAWS
from flowception.generation.generate import GenerateOptions, generate


@pytest.fixture
def job(make_run, tmp_path):
    def run(run_changes=(), out="out", **options):
        settings = {
            "num": 4,
            "num_inference_steps": 5,
            "batch_size": 3,
            "seed": 20,
            "max_frames": 9,
            "device": "cpu",
        }
        return generate(
            GenerateOptions(run_dir=make_run(**dict(run_changes)), out_dir=tmp_path / out, **{**settings, **options})
        )

    return run


def test_every_file_is_written_and_listed(job, tmp_path):
    records = job()
    out = tmp_path / "out"
    assert [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()] == records
    assert [r["class_name"] for r in records] == ["red", "green", "blue", "red"]
    assert [r["class_label"] for r in records] == [0, 1, 2, 0]
    assert [r["seed"] for r in records] == [20, 21, 22, 23]
    for number, record in enumerate(records):
        assert record["file"] == f"clip_{number:04d}.mp4"
        assert record["task"] == "t2v"
        assert 5 <= record["evaluations"] <= 10
        assert record["flops"] > 0
        assert read_video(out / record["file"]).shape == (record["frames"], 6, 4, 3)
        with Image.open(out / f"clip_{number:04d}.gif") as preview:
            assert preview.size == (4 * 26, 6 * 26)
        assert (out / f"clip_{number:04d}_growth.png").stat().st_size > 5000
    assert (out / "contact.png").is_file()


def test_a_clip_does_not_depend_on_the_batch(job, monkeypatch):
    """Compared before H.264, where one pixel that rounds differently would change its entire block."""
    written = {}

    def write_mp4(path, video, *, fps):
        written[path.parent.name, path.name] = video.astype(int)

    monkeypatch.setattr("flowception.generation.clip.write_mp4", write_mp4)
    job(out="together", batch_size=4)
    job(out="alone", batch_size=1)
    for number in range(4):
        one, other = (written[out, f"clip_{number:04d}.mp4"] for out in ("together", "alone"))
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1  # latents agree to 1e-4 (test_predictor), so a level may round up or down


def test_i2v_starts_with_the_context_image(job, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    for image, file in zip(images, files):
        Image.fromarray(image).save(file)
    records = job(task="i2v", context=tuple(files))
    for number, record in enumerate(records):
        assert record["task"] == "i2v"
        shown = read_video(tmp_path / "out" / record["file"])[0].astype(int)
        assert np.abs(shown - images[number % 2]).mean() <= 8  # the measured loss of H.264 is 2
        assert np.abs(shown - images[1 - number % 2]).mean() > 20


@pytest.fixture
def video(tmp_path):
    """A file of 7 different noisy frames, and its decoded frames."""
    pixels = np.random.default_rng(1).integers(0, 256, (7, 6, 4, 3), dtype=np.uint8)
    write_video(tmp_path / "context.mp4", pixels, fps=8)
    return tmp_path / "context.mp4", read_video(tmp_path / "context.mp4")


def given_frames(record):
    return [k for k, role in enumerate(record["roles"]) if role.startswith("context")]


@pytest.mark.parametrize(
    ("task", "keep", "given"),
    [
        ("v2v", (1, 2, 3), [1, 2, 3]),
        ("v2v", None, [3, 4, 5, 6]),
        ("interpolation", None, [0, 6]),
        ("interpolation", (0, 2, 3), [0, 2, 3]),
        ("completion", None, [0, 6]),
        ("completion", (0, 1, 3), [0, 1, 3]),
        ("completion", (2, 3, 6), [2, 3, 6]),
    ],
)
def test_context_frames_are_unchanged(job, monkeypatch, video, task, keep, given):
    """Pixels before H.264 equal the file's, since the codec is lossless; nothing is right of a passive frame."""
    path, pixels = video
    written = []
    monkeypatch.setattr("flowception.generation.clip.write_mp4", lambda path, video, *, fps: written.append(video))
    mixture = {"t2v": 1, "v2v": 1, "interpolation": 1, "completion": 1}
    changes = {"tasks": mixture, "max_context_frames": 4}
    records = job(changes, task=task, context=(path,), keep=keep, max_frames=12, num_inference_steps=8)
    begun_with = len(given) + (2 if task == "v2v" else 0) + (task == "completion" and given[0] > 0)
    for record, shown in zip(records, written, strict=True):
        at = given_frames(record)
        assert np.array_equal(shown[at], pixels[given])
        if task == "v2v":
            assert at == [0, 1, 2, 3][: len(given)]
        if task == "interpolation":
            assert (at[0], at[-1]) == (0, record["latent_frames"] - 1)
        if task == "completion":
            assert (at[0] == 0) == (given[0] == 0)
            assert (at[-1] == record["latent_frames"] - 1) or given[-1] != 6
            for k, following in enumerate(given[1:]):
                if following == given[k] + 1:
                    assert at[k + 1] == at[k] + 1
    assert max(record["latent_frames"] for record in records) > begun_with, "something must have been inserted"


def test_a_task_unseen_in_training_is_reported(job, video, console):
    job(task="completion", context=(video[0],), num=1)
    assert "WARNING: the run was not trained on completion, only on t2v" in console.readouterr().out


@pytest.mark.parametrize("law", PRESCRIBED_LAWS)
def test_a_run_of_a_prescribed_law_continues_and_interpolates(job, video, law):
    changes = {"delay_law": law, "tasks": {"v2v": 1, "interpolation": 1}}
    options = {"context": (video[0],), "num": 1}
    (record,) = job(changes, task="v2v", keep=(0, 1, 2), num_frames=5, **options)
    assert (record["latent_frames"], given_frames(record)) == (5, [0, 1, 2])
    (record,) = job(changes, task="interpolation", keep=(0, 3, 6), num_frames=9, **options)
    assert (record["latent_frames"], given_frames(record)) == (9, [0, 4, 8])
    with pytest.raises(ConfigError, match="`num_frames` must exceed the 3 frames of the context, got 3"):
        job(changes, task="v2v", keep=(0, 1, 2), num_frames=3, **options)
    with pytest.raises(ConfigError, match="`task` completion needs a run with delay_law uniform"):
        job(changes, task="completion", num_frames=9, **options)


@pytest.mark.parametrize("law", PRESCRIBED_LAWS)
def test_a_run_of_a_prescribed_law_makes_clips_of_the_requested_length(job, law):
    changes = {"delay_law": law}
    records = job(changes, num=2, num_frames=7)
    assert [r["latent_frames"] for r in records] == [7, 7]
    evaluations = {r["evaluations"] for r in records}
    assert evaluations <= {"full_sequence": {5}, "autoregressive": {35}}.get(law, set(range(6, 11)))
    with pytest.raises(ConfigError, match="set `num_frames`"):
        job(changes)
    with pytest.raises(ConfigError, match="chooses the length itself"):
        job(num_frames=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "i2v"}, "needs `context`"),
        ({"task": "completion"}, "needs `context`"),
        ({"task": "v2t"}, "task must be one of .*, got 'v2t'"),
        ({"prompt": "a red disc"}, "trained without text"),
        ({"class_label": "purple"}, "purple"),
        ({"class_label": "3"}, "from 0 to 2"),
        ({"size": (7, 4)}, "multiples of 2"),
        ({"device": "cuda:99"}, "`device` is cuda:99, but this machine has"),
        ({"device": "abacus"}, "`device` must be .*, got abacus"),
        ({"fps": 0}, "`fps` must be a number > 0, .*, got 0"),
        ({"fps": float("nan")}, "`fps` must be a number > 0, .*, got nan"),
        ({"max_frames": 1}, "`max_frames` must be at least the number of frames a clip starts with"),
    ],
)
def test_unsupported_options_write_nothing(job, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        job(**options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"delay_law": "full_sequence"}, {"num_frames": 9, "max_frames": 8}, "`num_frames` must be at most `max_fr"),
        ({"model_changes": {"attention_pattern": "causal"}}, {"cache_refresh": 1}, "cache_refresh"),
    ],
)
def test_what_a_run_does_not_support_is_refused_before_the_lists_begin(job, tmp_path, changes, options, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "clips.jsonl").write_text("earlier\n")
    with pytest.raises(ConfigError, match=message):
        job(changes, **options)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("clips.jsonl", "earlier\n")]


def test_a_folder_that_cannot_be_created_is_refused(job, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="must be a folder, got the file"):
        job(out="file")
    with pytest.raises(ConfigError, match="cannot create `out`"):
        job(out="file/below")
    assert (tmp_path / "file").read_text() == "kept"


def test_cached_keys_of_finished_frames_save_flops(job):
    plain, exact, cached = (job(out=f"{r}", cache_refresh=r) for r in (None, 1, 3))
    for one, same, other in zip(plain, exact, cached, strict=True):
        assert one["evaluations"] == same["evaluations"] == other["evaluations"]
        assert one["frames"] == same["frames"] == other["frames"]
        assert one["flops"] == same["flops"] > other["flops"]
