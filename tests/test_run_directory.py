import errno
import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from flowception import run_directory
from flowception.errors import ConfigError, RunDirectoryError
from flowception.shards.schema import NullText, ShardMeta
from flowception.training.config import load_config
from flowception.training.data import open_data
from flowception.training.estimate.report import Assumptions, report
from tests.training.workers.toy_set import CHANNELS, write_config, write_set


@pytest.fixture
def config(tmp_path):
    return load_config([write_config(tmp_path / "c.yaml", tmp_path / "run", write_set(tmp_path / "shards", clips=8))])


@pytest.fixture
def written(config, tmp_path):
    """A run directory with its description; returns (folder, manifest)."""
    (tmp_path / "run").mkdir()
    manifest = run_directory.describe(config.model, ShardMeta.load(tmp_path / "shards"))
    run_directory.write(config.run_dir, "", manifest)
    return tmp_path / "run", manifest


def alter_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"in_channels": CHANNELS + 1}, f"set model.in_channels={CHANNELS}"),
        ({"text_dim": 6}, r"encode with captions \(text.model\), or set model.text_dim=0"),
    ],
)
def test_a_model_that_does_not_fit_the_set_is_rejected_by_every_caller(config, changes, wanted):
    config.model = replace(config.model, **changes)
    with pytest.raises(ConfigError, match=wanted):
        open_data(config)
    _, problems = report(config, Assumptions(world_sizes="1"))
    assert len(problems) == 1
    assert re.search(wanted, problems[0])


def test_another_text_width_is_rejected(config, tmp_path):
    alter_meta(tmp_path / "shards", text_width=9, null_text=asdict(NullText.of(torch.zeros(1, 9))))
    open_data(config)
    config.model = replace(config.model, text_dim=6)
    with pytest.raises(ConfigError, match="set model.text_dim=9"):
        open_data(config)


def test_shards_of_another_codec_are_named_before_they_are_planned(config, written, tmp_path):
    open_data(config)
    alter_meta(tmp_path / "shards", codec_fingerprint="0" * 64)
    config.plan.token_budget = 6
    with pytest.raises(RunDirectoryError, match="trained on shards of codec_fingerprint f"):
        open_data(config)


def test_a_source_of_weights_must_name_its_codec(config, written, tmp_path):
    meta = ShardMeta.load(tmp_path / "shards")
    run_directory.check_codec(written[0], meta, new_is_fine=False)
    (written[0] / "manifest.json").unlink()
    run_directory.check_codec(written[0], meta)
    with pytest.raises(RunDirectoryError, match=r"has no manifest\.json"):
        run_directory.check_codec(written[0], meta, new_is_fine=False)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', "\udcff"])
def test_a_damaged_manifest_is_named(written, text):
    folder, manifest = written
    (folder / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(RunDirectoryError, match=r"run/manifest\.json"):
        run_directory.check(folder, manifest)


def test_an_impossible_run_directory_is_named(written, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="file/run"):
        run_directory.lock(tmp_path / "file" / "run")
    with pytest.raises(RunDirectoryError, match="file/run"):
        run_directory.check(tmp_path / "file" / "run", written[1])
    with pytest.raises(RunDirectoryError, match="file/run"):
        run_directory.write(tmp_path / "file" / "run", "", written[1])


def test_a_filesystem_without_locks_is_not_a_second_job(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("flowception.files.fcntl.flock", flock)
    with pytest.raises(RunDirectoryError, match="No locks available.*supports flock") as caught:
        run_directory.lock(tmp_path)
    assert "in use" not in str(caught.value)
