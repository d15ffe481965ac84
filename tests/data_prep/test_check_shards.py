import json
import shutil

import pytest

from data_prep.check_shards import main, suggested_token_budget
from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.encoder import ShardEncoder
from data_prep.show_shards import main as show
from flowception.shards.reader import ShardReader
from tests.faults.data.http_server import serve


@pytest.fixture(scope="module")
def good(toy_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("check") / "set"
    config = EncodeConfig(source=str(toy_folder / "manifest.jsonl"), out=str(out), height=16, width=16)
    ShardEncoder(config).run()
    return out


@pytest.fixture
def copied(good, tmp_path):
    return shutil.copytree(good, tmp_path / "set")


def test_a_good_set(good, capsys):
    assert main([str(good)]) == 0
    said = capsys.readouterr().out
    frames = ShardReader(good).index.clips["frames"].tolist()
    assert f"12 clips, {sum(frames)} latent frames, 1 shards" in said
    assert "rebuilt here with the same fingerprint" in said
    assert "4 x 4  17  12" in said
    assert f"  {min(frames):>4} {frames.count(min(frames)):>8} #" in said
    assert "12 of 12 clips are good, 0 bad" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_every_damaged_clip_is_listed_with_its_reason(copied, capsys, workers):
    reader = ShardReader(copied)
    clips = reader.index.clips
    with (copied / "shard-000000.tar").open("r+b") as file:
        for offset in (int(clips["latents_offset"][2]) + 5, int(clips["start"][7]) + 600):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
    assert main([str(copied), "--num-workers", str(workers)]) == 1
    said = capsys.readouterr().out
    assert f"BAD {reader.index.key(2)}: clip {reader.index.key(2)} in" in said
    assert "latent frame 0 does not match its checksum" in said
    assert f"BAD {reader.index.key(7)}: " in said
    assert "10 of 12 clips are good, 2 bad" in said


def test_a_set_that_cannot_be_opened_is_bad(copied, capsys):
    (copied / "shard-000000.tar").unlink()
    assert main([str(copied)]) == 1
    assert "BAD SET: shard" in capsys.readouterr().err


def test_another_codec_is_reported(copied, capsys):
    meta = json.loads((copied / "meta.json").read_text())
    (copied / "meta.json").write_text(json.dumps(meta | {"codec_config": {"patch_size": 2}}))
    assert main([str(copied)]) == 0
    assert "cannot be rebuilt here (the codec patchify built here has fingerprint" in capsys.readouterr().out


def test_the_suggested_budget_fits_the_longest_clip_and_the_mean_clips_per_pack(good):
    reader = ShardReader(good)
    frames = reader.index.clips["frames"].astype(int)
    budget, least = suggested_token_budget(reader, 16)
    assert least == 17 * frames.max()
    assert 0 <= budget - 16 * 0.75 * 17 * frames.mean() < 256
    assert suggested_token_budget(reader, 1)[0] == 256


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_is_checked_like_a_local_one(copied, tmp_path, capsys, workers):
    reader = ShardReader(copied)
    with (copied / "shard-000000.tar").open("r+b") as file:
        file.seek(int(reader.index.clips["latents_offset"][2]))
        file.write(b"\x55" * 16)
    with serve(copied) as server:
        words = [server.url, "--num-workers", str(workers), "--cache-dir", str(tmp_path / "cache")]
        assert main(words) == 1
        assert "11 of 12 clips are good, 1 bad" in capsys.readouterr().out
        assert show([server.url, "--num", "2", "--out", str(tmp_path / "sheet.png"), *words[3:]]) == 0
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main([server.url, "--cache-dir", str(blocked)]) == 2
    assert "cannot create data.cache.cache_dir=" in capsys.readouterr().err
