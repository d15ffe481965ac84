"""A small network trained with the real trainer on Gaussian clips approaches the exact oracle.

A biased target, a wrong weight or mask, or a network that is not shown what it needs cannot pass.
"""

import pytest

from tests.distributed_worker import run_distributed

WORKER = "tests.training.workers.gaussian_run"


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_trained_network_is_within_5_percent_of_the_bayes_errors(tmp_path):
    (excess,) = run_distributed(WORKER, "train_and_compare", 1, folder=str(tmp_path), timeout_s=1400)
    print(f"over the Bayes error: velocity {excess['velocity']:.2%}, rate deviance {excess['rate']:.2%}")
    assert excess["heldout_clips"] > 1000
    assert excess["velocity"] <= 0.05
    assert excess["rate"] <= 0.05


def test_an_untrained_network_is_far_from_it(tmp_path):
    """The same measurement after one step, to show that the test can fail."""
    (excess,) = run_distributed(
        WORKER, "train_and_compare", 1, folder=str(tmp_path), timeout_s=240, clips_of_each_length=300, max_steps=1
    )
    assert excess["velocity"] > 0.2
    assert excess["rate"] > 0.05
