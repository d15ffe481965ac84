import os

import pytest

from data_prep.encode_shards import main
from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.encoder import ShardEncoder
from data_prep.encoder.status import read_status
from flowception.codecs.patchify import PatchifyCodec
from flowception.errors import ConfigError, DataError
from flowception.files import FileLock


@pytest.fixture
def started(toy_folder, tmp_path, monkeypatch):
    """A set of 6 shards of 2 videos: three done, at 100, 110, and 130 s, and one partially written."""
    config = EncodeConfig(
        source=str(toy_folder / "manifest.jsonl"), out=str(tmp_path / "set"), height=16, width=16, videos_per_shard=2
    )
    encode, calls = PatchifyCodec.encode, []

    def dies(codec, video):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(codec, video)

    monkeypatch.setattr(PatchifyCodec, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        ShardEncoder(config).run()
    monkeypatch.undo()
    for shard, when in enumerate((100, 110, 130)):
        os.utime(tmp_path / "set" / f"shard-{shard:06d}.index.npz", (when, when))
    return config, tmp_path / "set"


def test_done_running_failed_speed_and_time_left(started):
    _, folder = started
    status = read_status(folder)
    assert (status.shards, status.done, status.running, status.failed, status.clips) == (6, 3, (), (3,), 6)
    assert status.clips_per_s == pytest.approx(4 / 30)
    assert status.seconds_left == pytest.approx(6 / (4 / 30))
    assert status.describe().splitlines() == [
        "shards: 3 of 6 done, 0 running, 1 failed, 2 waiting",
        "clips: 6 so far; 0 videos unreadable",
        "failed: shards 3; run the same command again to encode them",
        "speed: 0.1 clips/s, 0 min 45 s left; nothing is running",
    ]
    with FileLock(folder / ".shard-000003.lock", ConfigError), FileLock(folder / ".shard-000005.lock", ConfigError):
        status = read_status(folder)
    assert (status.running, status.failed) == ((3, 5), ())
    assert status.describe().splitlines()[-1] == "speed: 0.1 clips/s, 0 min 45 s left"


def test_a_finished_set_is_reported(started, capsys):
    config, folder = started
    ShardEncoder(config).run()
    status = read_status(folder)
    assert (status.done, status.failed, status.clips, status.finished) == (6, (), 12, True)
    assert status.describe().endswith("the set is finished")
    words = ["--config", f"source={config.source}", f"out={folder}", "--status"]
    capsys.readouterr()
    assert main(words) == 0
    assert "6 of 6 done" in capsys.readouterr().out


def test_no_job_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no encoding job found in"):
        read_status(tmp_path)
