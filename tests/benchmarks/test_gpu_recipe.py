"""Check 10 of ``benchmarks/gpu.sh``: number of checkpointed blocks, order of the arms, out of memory."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import recipe_checks
from benchmarks.gpu.forecasts import CHANGES
from benchmarks.gpu.recipe_checks import ARMS, _Runs, estimated_gib, fewest_checkpointed
from benchmarks.gpu.scene import COMMON_WORDS, RECIPE, RECIPE_CLIP, Case, Scene
from flowception.nn.build import count_parameters
from flowception.training.config import load_config
from flowception.training.estimate.arrangements import USABLE_SHARE
from flowception.training.hardware import GIB


@functools.cache
def recipe(compiled):
    """As on a GPU, and its parameters."""
    words = [*COMMON_WORDS, f"model.compile={compiled}", "model.activation_checkpointing=true"]
    case = Case(load_config([RECIPE], words), RECIPE_CLIP)
    return case, count_parameters(case.config.model)


@functools.cache
def estimates(compiled):
    """GiB with every number of checkpointed blocks."""
    case, parameters = recipe(compiled)
    models = [replace(case.config.model, activation_checkpointing=blocks) for blocks in range(39)]
    return [estimated_gib(Case(replace(case.config, model=model), RECIPE_CLIP), parameters) for model in models]


@pytest.mark.parametrize("compiled", ["leaves", "blocks"])
@pytest.mark.parametrize("memory_gib", [47.5, 79.1, 139.8, 40.0, 20.0])
def test_as_few_blocks_are_checkpointed_as_the_estimate_without_the_ema_allows(compiled, memory_gib):
    fitting = [blocks for blocks, gib in enumerate(estimates(compiled)) if gib <= USABLE_SHARE * memory_gib]
    found = fewest_checkpointed(*recipe(compiled), memory_gib * GIB)
    assert found == (fitting[0] if fitting else 38)


def test_the_most_telling_arms_come_first_and_each_has_its_row():
    assert [(arm.compile, arm.checkpointed) for arm in ARMS] == [
        ("off", True),
        ("blocks", False),
        ("leaves", True),
        ("leaves", False),
    ]
    assert {change.arm for change in CHANGES if change.arm} == {arm.name for arm in ARMS}


def run_pretended(monkeypatch, folder, fits_from, fewest=4):
    """All arms on a GPU that runs out of memory with fewer checkpointed blocks than ``fits_from``."""

    def pretend(scene, arm, more_blocks, batches, found):
        blocks = 38 if arm.checkpointed else min(fewest + more_blocks, 38)
        figures = {"checkpointed_blocks": blocks, "layers": 38, "estimated_gib": 70.0, "peak_gib": 60.0}
        figures |= {"card": "NVIDIA H100 80GB HBM3"}
        ran = {"ms_per_pack": 300.0, "optimizer_ms": 80.0, "losses": [1.0]}
        found.write_text(json.dumps(figures | (ran if blocks >= fits_from else {"out_of_memory": "full"})))

    monkeypatch.setattr(recipe_checks, "run_arm", pretend)
    scene = Scene.of("cpu", folder)
    figures = {"parameters": 2.17e9, "pack_tflop": 119.7, "pack_tflop_peers": 118.0, "arms": {}}
    recipe_checks._run_arms(_Runs(scene, [], figures))
    noted = json.loads(Path(scene.note_path).read_text())
    assert noted["figures"] == figures, "what is noted after an arm is all there is, should the check be ended"
    return figures["arms"], noted["summary"]


def test_each_arm_says_how_many_blocks_were_checkpointed(tmp_path, monkeypatch):
    arms, said = run_pretended(monkeypatch, tmp_path, fits_from=0)
    assert [arm["checkpointed_blocks"] for arm in arms.values()] == [38, 4, 38, 4]
    assert "blocks compiled, fewest checkpointed (4 of 38 checkpointed): 300 ms a pack, MFU 40.3%, 60.0 GiB" in said
    assert all("tries" not in arm for arm in arms.values())


def test_a_full_gpu_gets_more_blocks_checkpointed_and_at_last_the_arm_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "twelve").mkdir()
    arms, said = run_pretended(monkeypatch, tmp_path / "twelve", fits_from=12)
    assert [arm["checkpointed_blocks"] for arm in arms.values()] == [38, 12, 38, 12]
    assert "(12 of 38 checkpointed): 300 ms a pack, MFU 40.3%, 60.0 GiB (estimate 70.0), out of memory with 4" in said
    (tmp_path / "all").mkdir()
    arms, said = run_pretended(monkeypatch, tmp_path / "all", fits_from=38)
    assert ["ms_per_pack" in arm for arm in arms.values()] == [True, False, True, False]
    assert "blocks compiled, fewest checkpointed (20 of 38 checkpointed): out of memory" in said


def test_a_process_whose_imports_have_started_cuda_forks_no_arm(tmp_path, monkeypatch):
    scene = Scene.of("cpu", tmp_path)
    assert not recipe_checks._forks_badly(scene)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert recipe_checks._forks_badly(scene)
    monkeypatch.setattr(recipe_checks.importlib, "import_module", lambda name: None)
    found = tmp_path / "arms.json"
    recipe_checks._import_and_run_arms(_Runs(scene, [], {"arms": {}}), found)
    assert json.loads(found.read_text()) == {}
