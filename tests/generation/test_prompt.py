"""Prompts on a run trained with text: the encoder that made the shards, another one, and none."""

import dataclasses

import numpy as np
import pytest
import torch

from data_prep.make_toy_text_encoder import make_text_encoder
from flowception.codecs.text import TextEncoder, TextEncoderConfig
from flowception.data.schema import NullText
from flowception.errors import ConfigError
from flowception.generation.load import load_run
from flowception.generation.prompt import encode_prompt
from flowception.generation.run import GenerateOptions, generate

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return make_text_encoder(tmp_path_factory.mktemp("encoder"), width=16)


@pytest.fixture(scope="module")
def run_with_text(make_run, encoder_folder):
    """Its shard set names the encoder and holds the empty caption's embedding."""
    config = TextEncoderConfig(model=str(encoder_folder), dtype="float32")
    null_text = NullText.of(TextEncoder.from_config(config).encode([""])[0])
    meta = {"text_width": 16, "null_text": null_text, "text_config": dataclasses.asdict(config)}
    return make_run(model_changes={"text_dim": 16}, meta_changes=meta)


def test_the_encoder_of_the_shards_is_taken(run_with_text, encoder_folder):
    run = load_run(run_with_text)
    prompt = encode_prompt(run, "a red disc moving left and up", None, torch.device("cpu"))
    assert prompt.shape == (8, 16)
    named = encode_prompt(run, "a red disc moving left and up", str(encoder_folder), torch.device("cpu"))
    assert torch.equal(prompt, named)
    assert run.null_text.shape == (1, 16)


def test_another_encoder_is_refused(run_with_text, tmp_path):
    run = load_run(run_with_text)
    other = make_text_encoder(tmp_path / "other", width=16, seed=1)
    with pytest.raises(ConfigError, match="otherwise than the encoder that made the shards"):
        encode_prompt(run, "a red disc", str(other), torch.device("cpu"))
    wide = make_text_encoder(tmp_path / "wide", width=32)
    with pytest.raises(ConfigError, match="text of width 32, the model was trained with 16"):
        encode_prompt(run, "a red disc", str(wide), torch.device("cpu"))


def test_the_prompt_changes_the_clip_and_none_is_the_null_text(run_with_text, tmp_path, monkeypatch):
    """Compared before H.264, where one pixel that rounds the other way would move its whole block."""
    written = {}

    def write_mp4(path, video, *, fps):
        written.setdefault(path.parent.name, []).append(video.astype(int))

    monkeypatch.setattr("flowception.generation.run.write_mp4", write_mp4)
    for name, prompt in (("red", "a red disc"), ("cyan", "a cyan disc"), ("none", None), ("empty", "")):
        options = {"num_clips": 2, "num_inference_steps": 4, "max_frames": 6, "device": "cpu", "class_label": "null"}
        out = tmp_path / name
        records = generate(GenerateOptions(run_dir=run_with_text, out_dir=out, prompt=prompt, guidance=3.0, **options))
        assert [record["prompt"] for record in records] == [prompt] * 2

    def largest_difference(name, other):
        pairs = zip(written[name], written[other], strict=True)
        return max(255 if a.shape != b.shape else int(np.abs(a - b).max()) for a, b in pairs)

    assert largest_difference("red", "cyan") > 4  # 9 and 16 were measured
    assert largest_difference("red", "none") > 4
    assert largest_difference("empty", "none") <= 1  # the same text, but read back from the set: a level may round
