"""Prompts for a run trained with text: correct, wrong and missing encoder, and prompts files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.make_toy_text_encoder import make_text_encoder
from flowception.errors import ConfigError
from flowception.generation.generate import GenerateOptions, generate
from flowception.generation.load import load_run
from flowception.generation.prompt import Prompt, encode_prompts, read_prompts
from tests.generation.conftest import text_changes

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return make_text_encoder(tmp_path_factory.mktemp("encoder"), width=16)


@pytest.fixture(scope="module")
def run_with_text(make_run, encoder_folder):
    return make_run(**text_changes(encoder_folder))


def test_the_encoder_of_the_shards_is_used(run_with_text, encoder_folder):
    run = load_run(run_with_text)
    captions = ["a red disc moving left and up", "a disc", "", None]
    found = encode_prompts(run, captions, None, torch.device("cpu"))
    assert set(found) == set(captions)
    assert found[captions[0]].shape == (8, 16)
    assert torch.equal(found[""], found[None])
    assert torch.equal(found[None], run.null_text)
    named = encode_prompts(run, captions[:1], str(encoder_folder), torch.device("cpu"))
    assert torch.equal(found[captions[0]], named[captions[0]]), "whatever other captions there are"
    assert run.null_text.shape == (1, 16)


def test_another_encoder_is_refused(run_with_text, tmp_path):
    run = load_run(run_with_text)
    other = make_text_encoder(tmp_path / "other", width=16, seed=1)
    with pytest.raises(ConfigError, match="differently from the encoder that made the shards"):
        encode_prompts(run, ["a red disc"], str(other), torch.device("cpu"))
    wide = make_text_encoder(tmp_path / "wide", width=32)
    with pytest.raises(ConfigError, match="must have width 16, as in training, got 32"):
        encode_prompts(run, ["a red disc"], str(wide), torch.device("cpu"))


@pytest.fixture
def written(monkeypatch):
    """Clips by folder before H.264, where one pixel that rounds differently would change its entire block."""
    clips = {}

    def write_mp4(path, video, *, fps):
        clips.setdefault(path.parent.name, {})[path.name] = video.astype(int)

    monkeypatch.setattr("flowception.generation.clip.write_mp4", write_mp4)
    monkeypatch.setattr("flowception.generation.clip.Growth.save", lambda *arguments: None)
    return clips


def largest_difference(clips, others):
    return max(
        255 if clips[name].shape != others[name].shape else int(np.abs(clips[name] - others[name]).max())
        for name in sorted(clips.keys() | others.keys())
    )


SETTINGS = {"num_inference_steps": 4, "max_frames": 6, "device": "cpu", "class_label": "null"}


def test_the_prompt_changes_the_clip_and_no_prompt_means_null_text(run_with_text, tmp_path, written, console):
    for name, prompt in (("red", "a red disc"), ("cyan", "a cyan disc"), ("none", None), ("empty", "")):
        out = tmp_path / name
        records = generate(
            GenerateOptions(run_dir=run_with_text, out_dir=out, prompt=prompt, guidance=3.0, num=2, **SETTINGS)
        )
        assert [record["prompt"] for record in records] == [prompt] * 2
        assert ("WARNING: clips are unconditional" in console.readouterr().out) == (prompt is None)
    assert largest_difference(written["red"], written["cyan"]) > 4  # measured: 9 and 16
    assert largest_difference(written["red"], written["none"]) > 4
    assert (
        largest_difference(written["empty"], written["none"]) <= 1
    )  # the same text, but read back from the set, so a level may round


RED, CYAN, GREEN = (f"a {color} disc moving left and up" for color in ("red", "cyan", "green"))


@pytest.mark.parametrize("cache_refresh", [None, 2])
def test_a_clip_depends_only_on_its_own_prompt(run_with_text, tmp_path, written, cache_refresh):
    """Two rounds over three prompts of different lengths, with guidance: clip i equals --prompt with its seed."""
    captions = [RED, "a disc", CYAN]
    (tmp_path / "prompts.txt").write_text("".join(f"{caption}\n\n" for caption in captions))
    settings = {**SETTINGS, "guidance": 3.0, "cache_refresh": cache_refresh, "run_dir": run_with_text}
    together = GenerateOptions(
        out_dir=tmp_path / "together",
        prompts_file=tmp_path / "prompts.txt",
        num=2,
        batch_size=4,
        **settings,
    )
    records = generate(together)
    assert [(record["prompt"], record["seed"]) for record in records] == list(zip(captions * 2, range(6)))
    for number, caption in enumerate(captions * 2):
        generate(GenerateOptions(out_dir=tmp_path / "alone", prompt=caption, num=1, seed=number, **settings))
        alone, clip = written["alone"]["clip_0000.mp4"], written["together"][f"clip_{number:04d}.mp4"]
        assert alone.shape == clip.shape
        # Latents agree to 1e-4 (test_predictor), so a level may round up or down.
        assert np.abs(alone - clip).max() <= 1
    first, second = ({name: written["together"][name]} for name in ("clip_0000.mp4", "clip_0002.mp4"))
    assert largest_difference(first, {"clip_0000.mp4": second["clip_0002.mp4"]}) > 8


def test_jobs_share_the_prompts(run_with_text, tmp_path, written):
    """Five clips with unordered seeds, in batches of two: the set of one job, in the order of clips."""
    lines = [{"prompt": RED, "seed": 9}, {"prompt": CYAN}, {"prompt": GREEN, "seed": 3, "class_label": "blue"},
             {"prompt": "", "seed": 9}, {"prompt": RED, "class_label": None}]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for out, num_parts in (("whole", 1), ("parts", 2)):
        for part in range(num_parts):
            generate(
                GenerateOptions(
                    run_dir=run_with_text,
                    out_dir=tmp_path / out,
                    prompts_file=tmp_path / "prompts.jsonl",
                    num=1,
                    batch_size=2,
                    seed=20,
                    part=part,
                    num_parts=num_parts,
                    **SETTINGS,
                )  # fmt: skip
            )
    listed = [(tmp_path / out / "clips.jsonl").read_text() for out in ("whole", "parts")]
    assert listed[0] == listed[1]
    records = [json.loads(line) for line in listed[0].splitlines()]
    assert [record["file"] for record in records] == [f"clip_{number:04d}.mp4" for number in range(5)]
    assert [record["seed"] for record in records] == [9, 21, 3, 9, 24]
    assert [record["prompt"] for record in records] == [RED, CYAN, GREEN, "", RED]
    assert [record["class_name"] for record in records] == [None, None, "blue", None, None]
    assert largest_difference(written["whole"], written["parts"]) <= 1


def test_each_context_file_is_paired_with_its_prompt(run_with_text, tmp_path, written):
    """Two images and two prompts, each pair twice."""
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
    for image, file in zip(images, files):
        Image.fromarray(image).save(file)
    (tmp_path / "prompts.txt").write_text(f"{RED}\n{CYAN}\n")
    records = generate(
        GenerateOptions(
            run_dir=run_with_text,
            out_dir=tmp_path / "out",
            task="i2v",
            context=tuple(files),
            prompts_file=tmp_path / "prompts.txt",
            num=2,
            batch_size=3,
            **SETTINGS,
        )  # fmt: skip
    )
    assert [record["prompt"] for record in records] == [RED, CYAN, RED, CYAN]
    for number, record in enumerate(records):
        assert np.array_equal(written["out"][record["file"]][0], images[number % 2])


def test_lines_become_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes('\ufeffein Hündchen, {"a"}\r\n \n\n  two  \nlast'.encode())
    assert [prompt.text for prompt in read_prompts(path)] == ['ein Hündchen, {"a"}', "two", "last"]
    assert [prompt.place for prompt in read_prompts(path)] == [f"--prompts {path}, line {k}" for k in (1, 4, 5)]
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": ""}\n\n{"class_label": 2, "prompt": " b ", "seed": 0}\n{"prompt": "c", "class_label": null}'
    )
    places = [f"--prompts {path}, line {k}" for k in (1, 3, 4)]
    assert read_prompts(path) == [
        Prompt(text="", place=places[0]),
        Prompt(text="b", seed=0, class_label="2", place=places[1]),
        Prompt(text="c", class_label="null", place=places[2]),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt has no prompt"),
        ("blank.jsonl", b"\n \n", "blank.jsonl has no prompt"),
        ("latin.txt", "Hündchen".encode("latin-1"), "is not UTF-8"),
        ("a.jsonl", b"\na red disc", "line 2 is not JSON"),
        ("a.jsonl", b'["a red disc"]', "must be an object with a prompt"),
        ("a.jsonl", b'{"prompt": 3}', "must be an object with a prompt"),
        ("a.jsonl", b'{"prompt": "a", "sed": 3}', "unknown key 'sed'"),
        ("a.jsonl", b'{"prompt": "a", "seed": -1}', "seed must be an integer .*, got -1"),
        ("a.jsonl", b'{"prompt": "a", "seed": 0.5}', "seed must be an integer .*, got 0.5"),
        ("a.jsonl", b'{"prompt": "a", "seed": 1e400}', "seed must be an integer .*, got inf"),
        ("a.jsonl", b'{"prompt": "a", "class_label": ["red"]}', "class_label must be a number, a name or null"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": "a", "class_label": "purple"}',
            "line 2: class must be .*, got 'purple'",
        ),
    ],
)
def test_a_malformed_prompts_file_writes_nothing(run_with_text, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    options = {"run_dir": run_with_text, "out_dir": tmp_path / "out", "prompts_file": tmp_path / name, "num": 1}
    with pytest.raises(ConfigError, match=message):
        generate(GenerateOptions(**options, **SETTINGS))
    assert not (tmp_path / "out").exists()


def test_contradictory_options_write_nothing(make_run, run_with_text, tmp_path):
    file = tmp_path / "prompts.txt"
    options = {"out_dir": tmp_path / "out", "prompts_file": file, "num": 1, **SETTINGS}
    with pytest.raises(ConfigError, match="cannot read --prompts"):
        generate(GenerateOptions(run_dir=run_with_text, **options))
    file.write_text("a red disc\n")
    with pytest.raises(ConfigError, match="`prompt` and `prompts` cannot be combined"):
        generate(GenerateOptions(run_dir=run_with_text, prompt="a red disc", **options))
    with pytest.raises(ConfigError, match="trained without text"):
        generate(GenerateOptions(run_dir=make_run(), **options))
    assert not (tmp_path / "out").exists()
