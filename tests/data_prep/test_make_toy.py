import json

import numpy as np

from data_prep.make_toy import make_toy
from flowception.codecs import CodecConfig, build_codec
from flowception.codecs.video_file import read_video
from flowception.evaluation.toy.score import score_clip
from flowception.evaluation.toy.summary import summarize
from flowception.evaluation.toy.world import CLASS_NAMES, LENGTH_LAW, draw_clip


def rows_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_the_manifest_matches_the_clips(toy_folder):
    rows = rows_of(toy_folder)
    assert len(rows) == 12
    for row in rows:
        assert row["class_name"] == CLASS_NAMES[row["class_label"]]
        assert row["class_name"] in row["caption"]
        assert len(read_video(toy_folder / row["path"])) == row["frames"]
        assert row["frames"] in LENGTH_LAW


def test_a_clip_depends_only_on_seed_and_number(toy_folder, tmp_path):
    """Up to codec precision: about 1 in 1,000 files from x264 differs in its bytes, for unknown reasons."""
    make_toy(tmp_path, clips=3, seed=3)
    for number in (0, 2):
        name, drawn = f"clip_{number:06d}.mp4", draw_clip(3, number).video.astype(int)
        for folder in (tmp_path, toy_folder):
            off_by = np.abs(read_video(folder / name) - drawn)
            assert off_by.max() <= 24
            assert off_by.mean() <= 2


def test_the_rules_of_the_world_survive_h264_and_the_codec(tmp_path):
    make_toy(tmp_path, clips=60, seed=11)
    codec = build_codec(CodecConfig())
    scores = []
    for row in rows_of(tmp_path):
        latents = codec.encode(read_video(tmp_path / row["path"])).bfloat16()
        scores.append(score_clip(np.asarray(codec.decode(latents)), row["class_label"]))
    summary = summarize(scores)
    assert summary.color_right >= 0.99
    assert summary.single_shape >= 0.99
    assert summary.position_right >= 0.99
    assert summary.color_constant >= 0.99
    assert summary.position_error_px < 0.05
    assert abs(summary.speed_px - 1.5) < 0.02
