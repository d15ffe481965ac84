"""ZeRO stages, world sizes and changes of world size train equally: largest differences of losses and EMA.

The runs are the trainer's own on the toy set, float32, four packs per step that differ in clips and lengths, so ranks
never see the same. A resumed run has two parameter groups (0.1 and no weight decay) and is changed in the middle of its
warm-up, which a cosine decay follows. ``pytest -s`` shows how far apart the losses come.
"""

import shutil

import pytest
import torch

from tests.distributed_worker import run_distributed
from tests.training.workers.equivalence_worker import CHANGED_AT, STEPS
from tests.training.workers.toy_set import read_metrics, write_set

WORKER = "tests.training.workers.equivalence_worker"
WORLD_SIZES = (1, 3, 4)

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.xdist_group("equivalence")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    write_set(folder / "shards")
    run_distributed(WORKER, "stages", 2, folder=str(folder), timeout_s=600)
    for world_size in WORLD_SIZES:
        shutil.copytree(folder / "begun", folder / f"changed_to_{world_size}")
        arguments = {"name": f"ranks_{world_size}", "resumed": f"changed_to_{world_size}"}
        run_distributed(WORKER, "alone", world_size, folder=str(folder), timeout_s=600, **arguments)
    return folder


def losses(run_dir, first=0):
    found = read_metrics(run_dir)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    compared = torch.tensor([line["loss"] for line in found[first:]], dtype=torch.float64)
    assert len(compared) == STEPS
    return compared


def largest_deviation(what, one, other):
    """Largest relative difference of two curves, printed for ``pytest -s``."""
    deviation = float(((one - other) / other).abs().max())
    print(f"{what}: largest relative deviation of the loss over {len(one)} steps {deviation:.2e}")
    return deviation


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_has_the_losses_of_stage_3(folder, stage):
    curves = [losses(folder / f"stage_{number}") for number in (stage, 3)]
    assert largest_deviation(f"ZeRO-{stage} and ZeRO-3", *curves) < 1e-4


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_four_packs_a_step_have_the_same_losses_on_any_number_of_ranks(folder, world_size):
    curves = [losses(folder / name) for name in (f"ranks_{world_size}", "stage_3")]
    assert largest_deviation(f"{world_size} and 2 ranks", *curves) < 1e-5


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_resume_at_another_world_size_continues_the_loss_curve(folder, world_size):
    curves = [losses(folder / name, first=CHANGED_AT) for name in (f"changed_to_{world_size}", "unchanged")]
    assert largest_deviation(f"2 ranks changed to {world_size} and unchanged", *curves) < 1e-4
    changed, unchanged = (read_metrics(folder / name) for name in (f"changed_to_{world_size}", "unchanged"))
    rates = [line["lr"] for line in unchanged]
    assert [line["lr"] for line in changed] == rates
    assert rates[CHANGED_AT - 1] < rates[CHANGED_AT] < max(rates) > rates[-1], "the schedule is in mid-flight"
    assert [line["clips"] for line in changed] == [line["clips"] for line in unchanged]


def test_the_runs_differ_where_they_should_and_learn(folder):
    """Weight decay and schedule must affect the losses, or the tests above prove less."""
    unchanged, other = losses(folder / "unchanged", first=CHANGED_AT), losses(folder / "stage_3")
    assert float((unchanged - other).abs().max()) > 1e-2
    assert float(other[-10:].mean()) < float(other[:10].mean())


def test_the_ema_is_bit_identical_to_that_of_one_process():
    """Ten steps on two ranks at every stage; the average is recomputed from the full weights of each step."""
    found = run_distributed(WORKER, "weights_by_step", 2, steps=10, timeout_s=600)[0]
    for stage, result in found.items():
        first, *rest = result["weights"]
        for name, value in first.items():
            average = torch.tensor(value)
            for weights in rest:
                average = torch.lerp(average, torch.tensor(weights[name]), 1 - result["decay"])
            assert average.tolist() == torch.tensor(result["ema"][name]).tolist(), (stage, name)
            assert average.tolist() != value, (stage, name)
