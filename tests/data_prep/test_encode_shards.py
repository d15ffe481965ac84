"""Content of an encoded set, what it skips, and the command that makes it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.encode_shards import main
from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.encoder import ShardEncoder
from data_prep.encoder.filters import FilterRange
from flowception.codecs import CodecConfig, build_codec
from flowception.codecs.patchify import PatchifyCodec
from flowception.codecs.text import TextEncoder, TextEncoderConfig
from flowception.codecs.video_file import read_video, write_video
from flowception.errors import ConfigError, DataError
from flowception.shards.reader import ShardReader
from tests.data_prep.encode_toy import ROOT, bytes_of, toy_config


def test_shards_match_the_videos(toy_folder, tmp_path):
    summary = ShardEncoder(toy_config(toy_folder / "manifest.jsonl", tmp_path / "set")).run()
    assert (summary.videos, summary.unreadable, summary.clips, summary.open_shards) == (12, 0, 12, 0)
    codec = build_codec(CodecConfig())
    reader = ShardReader(tmp_path / "set", codec="patchify", codec_fingerprint=codec.fingerprint())
    assert reader.meta.class_names == ["red", "lime", "cyan", "violet"]
    assert [s.clips for s in reader.meta.shards] == [5, 5, 2]
    rows = [json.loads(line) for line in (toy_folder / "manifest.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        video = torch.from_numpy(read_video(toy_folder / row["path"]))
        latents = reader.read(number, np.arange(row["frames"]))
        assert torch.equal(codec.decode(latents), video)
        about = reader.read_metadata(number)
        assert (about["class_label"], about["caption"], about["pixel_frames"], about["fps"]) == (
            row["class_label"],
            row["caption"],
            row["frames"],
            8.0,
        )


def test_unreadable_videos_are_listed_skipped_and_counted(tmp_path, write_counting_video):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_counting_video(videos / "a.mp4", 9)
    write_counting_video(videos / "short.mp4", 2)
    write_counting_video(videos / "z.mp4", 4)
    (videos / "broken.mp4").write_bytes((videos / "a.mp4").read_bytes()[:500])
    (videos / "text.mp4").write_text("no video at all")
    out = tmp_path / "set"
    summary = ShardEncoder(toy_config(videos, out, min_frames=3, max_frames=4, videos_per_shard=2)).run()
    assert (summary.videos, summary.unreadable, summary.clips) == (2, 3, 3)
    listed = [json.loads(line) for line in (out / "unreadable.jsonl").read_text().splitlines()]
    assert [row["source"] for row in listed] == ["broken.mp4", "short.mp4", "text.mp4"]
    assert "has 2 frames" in listed[1]["reason"]
    assert all("cannot be decoded" in listed[k]["reason"] for k in (0, 2))
    reader = ShardReader(out)
    assert [int(n) for n in reader.index.clips["frames"]] == [4, 4, 4]
    write_counting_video(videos / "broken.mp4", 3)
    (out / "shard-000000.index.npz").unlink()
    summary = ShardEncoder(toy_config(videos, out, min_frames=3, max_frames=4, videos_per_shard=2)).run()
    assert (summary.videos, summary.unreadable, summary.clips) == (3, 2, 4)
    assert sorted(int(n) for n in ShardReader(out).index.clips["frames"]) == [3, 4, 4, 4]


def test_a_source_without_readable_videos_is_an_error_that_points_to_the_reasons(tmp_path):
    (tmp_path / "a.mp4").write_text("no")
    with pytest.raises(DataError, match=r"none of the 1 videos.*unreadable\.jsonl"):
        ShardEncoder(toy_config(tmp_path, tmp_path / "set")).run()
    assert (tmp_path / "set" / "unreadable.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_frames": 100}, "max_frames must be .* ltx codec accepts, such as 97, got 100"),
        ({"height": 100, "width": 96}, "height must be a multiple of 32 for the ltx codec, such as 96, got 100"),
    ],
)
def test_sizes_that_the_codec_cannot_encode_are_refused_before_encoding(tmp_path, changes, message):
    class Fake:
        name, spatial_stride = "ltx", 32

        def usable_frames(self, frames):
            return 1 + (frames - 1) // 8 * 8

    with pytest.raises(ConfigError, match=message):
        replace(EncodeConfig(source="a", out="b"), **changes).check_codec(Fake())


def test_pieces_are_trimmed_to_lengths_that_the_codec_accepts(
    tmp_path, write_counting_video, frame_numbers, monkeypatch
):
    class ByThrees(PatchifyCodec):
        def usable_frames(self, pixel_frames):
            return pixel_frames // 3 * 3

    monkeypatch.setattr("data_prep.encoder.encoder.build_codec", lambda config, device: ByThrees(4))
    write_counting_video(tmp_path / "a.mp4", 11)
    write_counting_video(tmp_path / "b.mp4", 2)
    summary = ShardEncoder(toy_config(tmp_path, tmp_path / "set", max_frames=6)).run()
    assert (summary.videos, summary.unreadable, summary.clips, summary.dropped.pieces) == (1, 1, 2, {})
    reader = ShardReader(tmp_path / "set")
    shown = [frame_numbers(PatchifyCodec(4).decode(reader.read(row, np.arange(n)))) for row, n in ((0, 6), (1, 3))]
    assert shown == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    assert "b.mp4 has 2 frames" in (tmp_path / "set" / "unreadable.jsonl").read_text()


def test_captions_become_text(toy_folder, tmp_path, monkeypatch):
    class FakeText:
        text_dim = 3

        def encode(self, captions):
            return [
                torch.full((len(caption.split()), 3), 0.5) if caption else torch.full((1, 3), -0.5)
                for caption in captions
            ]

    monkeypatch.setattr(TextEncoder, "from_config", classmethod(lambda cls, config, device: FakeText()))
    config = toy_config(toy_folder / "manifest.jsonl", tmp_path / "set", text=TextEncoderConfig(model="fake"))
    ShardEncoder(config).run()
    reader = ShardReader(tmp_path / "set")
    assert reader.text_width == 3
    assert torch.equal(reader.read_text(0), torch.full((7, 3), 0.5, dtype=torch.bfloat16))
    assert torch.equal(reader.null_text, torch.full((1, 3), -0.5, dtype=torch.bfloat16))
    assert reader.meta.text_config["model"] == "fake"


def test_command_line(toy_folder, tmp_path, capsys):
    words = ["--config", str(ROOT / "configs/encode_toy.yaml"), f"source={toy_folder / 'manifest.jsonl'}"]
    assert main([*words, f"out={tmp_path / 'set'}"]) == 0
    assert "12 clips from 12 videos" in capsys.readouterr().out
    assert main([*words, f"out={tmp_path / 'b'}", "video_per_shard=3"]) == 2
    assert "videos_per_shard" in capsys.readouterr().err
    assert main([*words, f"out={tmp_path / 'b'}", "min_frames=0"]) == 2
    assert "min_frames must be an integer >= 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_configs_in_the_repository_are_valid():
    from flowception.config import load

    load(EncodeConfig, [ROOT / "configs/encode_toy.yaml"])
    ltx = load(EncodeConfig, [ROOT / "configs/encode_ltx.yaml"], ["source=a", "out=b"])
    assert (ltx.codec.name, ltx.max_frames) == ("ltx", 145)
    assert (ltx.fps, ltx.height, ltx.width) == (16, 256, 256)  # as the comments of configs/*_2b.yaml


def test_a_long_video_goes_through_the_codec_in_groups(tmp_path, write_counting_video, monkeypatch):
    """Ten pieces of one video, an unreadable one, and three more pieces: no call is larger than a batch, or empty."""
    videos, groups = tmp_path / "videos", list[int]()
    videos.mkdir()
    write_counting_video(videos / "a.mp4", 20)
    (videos / "b.mp4").write_text("no")
    write_counting_video(videos / "c.mp4", 6)
    encode_many = PatchifyCodec.encode_many

    def spy(codec, clips):
        groups.append(len(clips))
        return encode_many(codec, clips)

    monkeypatch.setattr(PatchifyCodec, "encode_many", spy)
    sets = []
    for batch, expected in ((1, [1] * 13), (4, [4, 4, 2, 3]), (100, [13])):
        groups.clear()
        out = tmp_path / f"set{batch}"
        assert ShardEncoder(toy_config(videos, out, max_frames=2, clips_per_batch=batch)).run().clips == 13
        assert groups == expected
        sets.append({name: content for name, content in bytes_of(out).items() if name != "encode_settings.json"})
    assert sets[0] == sets[1] == sets[2]


def test_dropped_pieces_are_counted_by_the_setting_that_dropped_them(tmp_path, capsys):
    """Pieces of four frames that move (m) or are static (s), and remainders of one frame; c has no clip at all."""
    videos, levels = tmp_path / "videos", {"m": [40, 90, 140, 190], "s": [128] * 4, "r": [128]}
    videos.mkdir()
    for name, pieces in (("a", "msmsr"), ("b", "mmr"), ("c", "ssr"), ("d", "ms")):
        gray = np.array([level for piece in pieces for level in levels[piece]], dtype=np.uint8)
        write_video(videos / f"{name}.mp4", np.broadcast_to(gray[:, None, None, None], (len(gray), 16, 16, 3)), fps=10)
    config = EncodeConfig(
        source=str(videos), out=str(tmp_path / "one"), max_frames=4, min_frames=2, min_motion=10, videos_per_shard=2
    )
    summary = ShardEncoder(config).run()
    assert (summary.clips, summary.unreadable, summary.dropped.pieces) == (5, 1, {"min_frames": 2, "min_motion": 3})
    shards = [json.loads((tmp_path / "one" / f"shard-00000{k}.dropped.json").read_text()) for k in (0, 1)]
    assert shards == [{"min_frames": 2, "min_motion": 2}, {"min_frames": 0, "min_motion": 1}]
    assert json.loads((tmp_path / "one" / "dropped.json").read_text()) == {"min_frames": 2, "min_motion": 3}
    for part in (1, 0):
        ShardEncoder(replace(config, out=str(tmp_path / "two"), part=part, num_parts=2)).run()
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    words = [f"source={videos}", f"out={tmp_path / 'one'}", "max_frames=4", "min_frames=2", "min_motion=10"]
    assert main(["--config", *words, "videos_per_shard=2"]) == 0
    printed = capsys.readouterr().out
    said = "min_frames dropped 2 pieces of these videos\nmin_motion dropped 3 pieces of these videos\n"
    assert said in printed
    assert main(["--config", *words, "videos_per_shard=2", "--status"]) == 0
    assert said in capsys.readouterr().out


def test_a_folder_of_frames_is_encoded_and_an_unreadable_one_is_listed(tmp_path):
    images = np.random.default_rng(6).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    for name in ("good", "bad", "empty"):
        (tmp_path / name).mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "good" / f"{number}.png")
        Image.fromarray(image).resize((16 + number, 16)).save(tmp_path / "bad" / f"{number}.png")
    (tmp_path / "m.csv").write_text("path\ngood\nbad\nempty\n")
    summary = ShardEncoder(toy_config(tmp_path / "m.csv", tmp_path / "set", frame_folder_fps=4.0)).run()
    assert (summary.videos, summary.unreadable, summary.clips) == (1, 2, 1)
    reader = ShardReader(tmp_path / "set")
    assert reader.read_metadata(0) | {"source": "good@0.000s", "fps": 4.0, "pixel_frames": 9} == reader.read_metadata(0)
    assert torch.equal(reader.read(0, np.arange(9)), PatchifyCodec(4).encode(images).bfloat16())
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "set" / "unreadable.jsonl").read_text().splitlines()]
    assert reasons[0].startswith("all frames of a folder must have the same size, got (16, 17) px for bad/1.png")
    assert reasons[1].startswith("empty contains no frames")


def test_missing_and_filtered_videos_are_reported_next_to_the_set(tmp_path, write_counting_video, console):
    (tmp_path / "video").mkdir()
    write_counting_video(tmp_path / "video" / "a.mp4", 4)
    (tmp_path / "OpenVid-1M.csv").write_text("video,caption,motion score\na.mp4,x,3\nb.mp4,y,3\n")
    config = toy_config(
        tmp_path, tmp_path / "set", source_format="openvid", filters={"motion score": FilterRange(min=2)}
    )
    assert ShardEncoder(config).run().clips == 1
    report = json.loads((tmp_path / "set" / "manifest_report.json").read_text())
    assert (report["listed"], report["missing"], report["kept"]) == (2, 1, 1)
    assert report["filters"] == [{"column": "motion score", "min": 2, "max": None, "removed": 0, "without_number": 0}]
    assert (tmp_path / "set" / "missing.txt").read_text() == "b.mp4\n"
    assert "missing: 1, such as b.mp4" in console.readouterr().out
    with pytest.raises(ConfigError, match="filters.motion score.min was 2, is now 1"):
        ShardEncoder(replace(config, filters={"motion score": FilterRange(min=1)}))


def test_filters_can_be_overridden_on_the_command_line(tmp_path):
    from flowception.config import load

    words = ["source=a", "out=b", "filters.seconds.min=1", "filters.seconds.max=9", "source_format=openvid"]
    config = load(EncodeConfig, [ROOT / "configs/encode_toy.yaml"], words)
    assert config.filters == {"seconds": FilterRange(min=1, max=9)}
    with pytest.raises(ConfigError, match="source_format"):
        load(EncodeConfig, [ROOT / "configs/encode_toy.yaml"], ["source=a", "out=b", "source_format=webvid"])
