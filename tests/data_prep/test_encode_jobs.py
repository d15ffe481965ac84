"""Encoding in several jobs, interrupted jobs, and concurrent jobs yields the same set."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from data_prep.encode_shards import main
from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.encoder import ShardEncoder
from data_prep.encoder.status import read_status
from data_prep.make_toy import make_toy
from flowception.codecs import CodecConfig
from flowception.codecs.patchify import PatchifyCodec
from flowception.errors import ConfigError
from flowception.files import FileLock
from flowception.shards.reader import ShardReader
from tests.data_prep.encode_toy import ROOT, bytes_of, toy_config


def test_an_interrupted_and_restarted_job_writes_the_same_bytes(toy_folder, tmp_path, monkeypatch):
    config = toy_config(toy_folder / "manifest.jsonl", tmp_path / "cut", videos_per_shard=3)
    encoder, encode, calls = ShardEncoder(config), PatchifyCodec.encode, []

    def interrupted(codec, video):
        calls.append(len(video))
        if len(calls) == 8:  # in the middle of the third shard
            raise KeyboardInterrupt
        return encode(codec, video)

    monkeypatch.setattr(PatchifyCodec, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.run()
    assert len(list((tmp_path / "cut").glob("shard-*.index.npz"))) == 2
    assert not (tmp_path / "cut" / "meta.json").exists()
    assert ShardEncoder(config).run().clips == 12
    assert len(calls) == 8 + 6
    ShardEncoder(replace(config, out=str(tmp_path / "whole"))).run()
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


@pytest.mark.long
def test_a_killed_and_restarted_job_writes_the_same_bytes(tmp_path):
    source = make_toy(tmp_path / "videos", clips=300, seed=5)
    (tmp_path / "videos" / "clip_000007.mp4").write_text("broken")
    command = [sys.executable, "data_prep/encode_shards.py", "--config", "configs/encode_toy.yaml", f"source={source}"]
    command += [f"out={tmp_path / 'killed'}", "videos_per_shard=3"]
    job = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("shard-*.index.npz"))) < 10 and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, "the job ended before it could be killed"
    done = len(list((tmp_path / "killed").glob("shard-*.index.npz")))
    assert 10 <= done < 100
    config = toy_config(source, tmp_path / "killed", videos_per_shard=3)
    untouched = (tmp_path / "killed" / "shard-000000.tar").stat().st_mtime_ns
    assert ShardEncoder(config).run().unreadable == 1
    assert (tmp_path / "killed" / "shard-000000.tar").stat().st_mtime_ns == untouched
    ShardEncoder(replace(config, out=str(tmp_path / "whole"))).run()
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_workers_and_parts_do_not_change_the_set(toy_folder, tmp_path):
    source = toy_folder / "manifest.jsonl"
    ShardEncoder(toy_config(source, tmp_path / "one")).run()
    ShardEncoder(toy_config(source, tmp_path / "two", num_workers=2)).run()
    second = ShardEncoder(toy_config(source, tmp_path / "three", num_parts=2, part=1)).run()
    assert second.open_shards == 2
    assert not (tmp_path / "three" / "meta.json").exists()
    assert ShardEncoder(toy_config(source, tmp_path / "three", num_parts=2, part=0)).run().open_shards == 0
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two") == bytes_of(tmp_path / "three")


def test_a_folder_of_another_job_is_refused(toy_folder, tmp_path):
    config = toy_config(toy_folder / "manifest.jsonl", tmp_path / "set")
    ShardEncoder(config).run()
    with pytest.raises(ConfigError) as refusal:
        ShardEncoder(replace(config, fps=4.0, codec=CodecConfig(patch_size=2)))
    assert str(refusal.value) == (
        f"{tmp_path / 'set'} was started with different settings: codec.patch_size was 4, is now 2, "
        "fps was None, is now 4.0; choose another out"
    )
    for settings in ("{}", "[]", "{"):
        (tmp_path / "set" / "encode_settings.json").write_text(settings)
        with pytest.raises(ConfigError, match=r"encode_settings\.json is damaged or of another version"):
            ShardEncoder(config)


def test_a_changed_list_of_videos_is_refused(tmp_path, write_counting_video):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_counting_video(videos / "a.mp4", 2)
    ShardEncoder(toy_config(videos, tmp_path / "set"))
    write_counting_video(videos / "b.mp4", 2)
    with pytest.raises(ConfigError) as refusal:
        ShardEncoder(toy_config(videos, tmp_path / "set"))
    assert str(refusal.value).endswith(": the list of videos changed: it had 1 video, now 2; choose another out")


def test_a_second_encoder_of_the_same_part_is_refused(toy_folder, tmp_path):
    encoder = ShardEncoder(toy_config(toy_folder / "manifest.jsonl", tmp_path / "set"))
    with FileLock(tmp_path / "set" / ".part-1.lock", ConfigError):
        assert encoder.run().open_shards == 0
    with (
        FileLock(tmp_path / "set" / ".part-0.lock", ConfigError),
        pytest.raises(ConfigError, match=r"set is in use by process \d+ on .*; it is encoding part 0 too"),
    ):
        encoder.run()
    assert encoder.run().open_shards == 0


def test_a_shard_that_another_job_is_writing_is_skipped(toy_folder, tmp_path):
    """With wrong part numbers, part 0 of 1 skips another job's shard, encodes the rest, and leaves the set open."""
    encoder = ShardEncoder(toy_config(toy_folder / "manifest.jsonl", tmp_path / "set"))
    with FileLock(tmp_path / "set" / ".shard-000001.lock", ConfigError):
        assert encoder.run().open_shards == 1
        assert read_status(tmp_path / "set").running == (1,)
        assert not encoder.writer.is_finished(1)
    assert encoder.run().open_shards == 0
    ShardEncoder(toy_config(toy_folder / "manifest.jsonl", tmp_path / "whole")).run()
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "whole")


def test_a_shard_finished_meanwhile_is_not_written_again(toy_folder, tmp_path):
    config = toy_config(toy_folder / "manifest.jsonl", tmp_path / "set", num_parts=2)
    late = ShardEncoder(config)
    write_shard = late.writer.write_shard

    def other_first(shard, clips):
        late.writer.write_shard = write_shard
        count = write_shard(shard, clips)
        ShardEncoder(
            replace(config, part=0, num_parts=3)
        )._encode_shards()  # shard 0 is done, 1 and 2 are of other parts
        ShardEncoder(replace(config, part=2, num_parts=3))._encode_shards()
        return count

    late.writer.write_shard = other_first
    late._encode_shards()
    times = {k: (tmp_path / "set" / f"shard-{k:06d}.tar").stat().st_mtime_ns for k in (0, 2)}
    late._encode_shards()
    assert {k: (tmp_path / "set" / f"shard-{k:06d}.tar").stat().st_mtime_ns for k in (0, 2)} == times
    assert ShardEncoder(replace(config, part=1)).run().open_shards == 0


def test_batch_size_does_not_change_the_set(tmp_path, write_counting_video):
    """Clips of different lengths and shapes, and unreadable videos, in batches of any size."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, frames in enumerate([9, 4, 1, 7, 3]):
        write_counting_video(videos / f"v{number}.mp4", frames, height=16 + 8 * (number % 2))
    (videos / "v2_broken.mp4").write_text("no")
    sets = []
    for batch in (1, 2, 100):
        out = tmp_path / f"set{batch}"
        config = EncodeConfig(
            source=str(videos), out=str(out), max_pixels=256, min_frames=2, max_frames=4, clips_per_batch=batch
        )
        summary = ShardEncoder(config).run()
        assert (summary.videos, summary.unreadable, summary.clips) == (4, 2, 6)
        settings = json.loads((out / "encode_settings.json").read_text())
        assert settings.pop("clips_per_batch") == batch
        sets.append({**bytes_of(out), "encode_settings.json": json.dumps(settings)})
    assert sets[0] == sets[1] == sets[2]
    assert [(grid["height"], grid["width"]) for grid in ShardReader(out).meta.tokens_per_frame] == [(4, 4), (5, 3)]


def test_a_full_disk_ends_the_job_with_one_line(toy_folder, tmp_path, capsys):
    """The second shard's counts go to ``/dev/full``, which fails. With space, the job continues at that shard."""
    words = ["--config", str(ROOT / "configs/encode_toy.yaml"), f"source={toy_folder / 'manifest.jsonl'}"]
    words += [f"out={tmp_path / 'set'}", "videos_per_shard=5"]
    partial = tmp_path / "set" / ".shard-000001.dropped.json.partial"
    partial.parent.mkdir()
    partial.symlink_to("/dev/full")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"cannot write .*shard-000001\.tar \(No space left on device\)", line)
    assert "run the same command again" in line
    partial.unlink()
    assert main(words) == 0
    assert "1 of 3 shards are already finished" in capsys.readouterr().out
