"""Loading a run directory: EMA weights of the correct step, the codec that made the shards, and clear errors."""

import json
import shutil

import pytest
import torch

from flowception.checkpoint.reader import read_full
from flowception.errors import CheckpointError, DataError, RunDirectoryError
from flowception.generation import load
from flowception.generation.load import load_run
from flowception.generation.predictor import NetworkPredictor


def test_the_newest_ema_weights_are_loaded(make_run, make_model):
    run = load_run(make_run())
    expected = dict(make_model().named_parameters())
    assert run.step == 4
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(value, expected[name] + 4 / 1000)
    assert not run.model.training
    assert run.sizes_pixels == [(6, 4)]


def test_a_step_can_be_chosen(make_run, make_model):
    run = load_run(make_run(), step=0)
    assert run.step == 0
    expected = dict(make_model().named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in run.model.named_parameters())


def test_a_missing_step(make_run):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; available: 0, 4"):
        load_run(make_run(), step=3)


@pytest.fixture
def copied_run(make_run, tmp_path):
    return shutil.copytree(make_run(), tmp_path / "run")


def test_a_damaged_newest_checkpoint_is_skipped(copied_run, console):
    file = next((copied_run / "checkpoints" / "step_00000004").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert load_run(copied_run).step == 0
    assert "step 4" in console.readouterr().out
    with pytest.raises(CheckpointError):
        load_run(copied_run, step=4)


def test_the_network_uses_the_loaded_weights_without_a_copy(make_run, monkeypatch):
    """They are not copied into existing parameters."""
    weights = {}
    monkeypatch.setattr(load, "read_full", lambda *what: weights.update(read_full(*what)) or weights)
    parameters = dict(load_run(make_run()).model.named_parameters())
    assert parameters.keys() == weights.keys()
    assert all(parameters[name].data_ptr() == weights[name].data_ptr() for name in weights)


def damage(folder, kind):
    """Overwrite all data of one kind in place, keeping sizes."""
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : (data := 8 + int.from_bytes(content[:8], "little"))])
    for name, entry in header.items():
        if name.startswith(f"{kind}/"):
            start, stop = (data + offset for offset in entry["data_offsets"])
            content[start:stop] = b"\xff" * (stop - start)
    file.write_bytes(content)


@pytest.mark.parametrize("step", [None, 4])
def test_only_ema_weights_are_read(copied_run, make_model, step):
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        damage(copied_run / "checkpoints" / "step_00000004", kind)
    run = load_run(copied_run, step=step)
    assert run.step == 4
    expected = dict(make_model().named_parameters())
    for name, value in run.model.named_parameters():
        assert torch.equal(value, expected[name] + 4 / 1000)


def test_damaged_ema_weights_are_found(copied_run, console):
    damage(copied_run / "checkpoints" / "step_00000004", "ema")
    assert load_run(copied_run).step == 0
    assert "skipping the checkpoint of step 4" in console.readouterr().out
    with pytest.raises(CheckpointError, match="sha256 of its ema does not match"):
        load_run(copied_run, step=4)


def test_a_checkpoint_of_another_model(copied_run):
    config = json.loads((copied_run / "config.yaml").read_text())
    config["model"]["num_classes"] = 4
    (copied_run / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not match the model.*class_embedding"):
        load_run(copied_run)


def test_activation_checkpointing_does_not_affect_generation(copied_run, make_state):
    config = json.loads((copied_run / "config.yaml").read_text())
    config["model"]["activation_checkpointing"] = "auto"
    (copied_run / "config.yaml").write_text(json.dumps(config))
    run, state = load_run(copied_run), make_state([2, 1])
    assert run.config.model.activation_checkpointing == run.model.config.activation_checkpointing == "auto"
    assert NetworkPredictor(run.model, [0, 1])(state)[0].isfinite().all()


def test_another_codec(copied_run):
    manifest = json.loads((copied_run / "manifest.json").read_text())
    manifest["shards"]["codec_config"] = {"patch_size": 4}
    (copied_run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="fingerprint"):
        load_run(copied_run)


def test_a_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        load_run(tmp_path)


def test_a_run_without_its_configuration(copied_run):
    (copied_run / "config.yaml").unlink()
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        load_run(copied_run)


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {}}'])
def test_a_damaged_manifest(copied_run, text):
    (copied_run / "manifest.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"manifest\.json"):
        load_run(copied_run)


def test_a_run_without_checkpoints(copied_run):
    shutil.rmtree(copied_run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_run(copied_run)
