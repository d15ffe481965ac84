"""Every baseline of ``configs`` trains with the common trainer and generates with the common sampler."""

import numpy as np
import pytest
import yaml

from flowception.flow.delays import PRESCRIBED_LAWS
from flowception.training.config import load_config
from tests.distributed_worker import run_distributed
from tests.training.workers.baseline_worker import CONFIGS, NUM_FRAMES, NUM_INFERENCE_STEPS, STEPS

pytestmark = pytest.mark.xdist_group("runs")
OVERLAYS = sorted(path.stem for path in CONFIGS.glob("baseline_*.yaml"))
EVALUATIONS = {"full_sequence": [NUM_INFERENCE_STEPS] * 2, "autoregressive": [NUM_FRAMES * NUM_INFERENCE_STEPS] * 2}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    worker = "tests.training.workers.baseline_worker"
    return run_distributed(worker, "train_and_generate", 1, folder=str(tmp_path_factory.mktemp("baselines")))[0]


def differing_lines(name):
    """Lines of an overlay that are not comments."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_baseline_is_a_few_lines_on_top_of_the_demo(name):
    assert len(differing_lines(name)) <= 6
    config = load_config([CONFIGS / "demo.yaml", CONFIGS / f"{name}.yaml"])
    overlay = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config.process.delay_law == overlay["delay_law"] in PRESCRIBED_LAWS
    assert config.run_dir == f"demo/{name.removeprefix('baseline_')}"


def test_every_law_has_a_baseline():
    assert {load_config([CONFIGS / "demo.yaml", CONFIGS / f"{n}.yaml"]).process.delay_law for n in OVERLAYS} == set(
        PRESCRIBED_LAWS
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["none", *OVERLAYS])
def test_it_trains(results, name):
    law, metrics = results[name]["law"], results[name]["metrics"]
    steps = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in steps)
    velocity = [line["loss/velocity"] for line in steps]
    assert np.mean(velocity[-5:]) < np.mean(velocity[:5])
    assert all((line["loss/insertion"] != 0) == (law == "uniform") for line in steps)
    assert any(np.isfinite(line.get("validation/loss/velocity", np.nan)) for line in metrics)


@pytest.mark.long
@pytest.mark.parametrize("name", ["none", *OVERLAYS])
def test_it_generates(results, name):
    law, clips = results[name]["law"], results[name]["clips"]
    assert len(clips) == 2
    evaluations = [clip["evaluations"] for clip in clips]
    assert evaluations == EVALUATIONS.get(law, evaluations)
    if law != "uniform":
        assert [clip["latent_frames"] for clip in clips] == [NUM_FRAMES] * 2
        if law not in EVALUATIONS:
            assert all(NUM_INFERENCE_STEPS < count <= 2 * NUM_INFERENCE_STEPS for count in evaluations)
