"""Diagnostics of a step, against sums computed separately."""

import math
from types import SimpleNamespace

import pytest
import torch

from flowception.packing.layout import ModelOutput
from flowception.training.diagnostics import OBSERVED, TIME_BINS, observe, observed_metrics


@pytest.fixture
def pack():
    """Five tokens of three frames, two channels; the last token has no velocity loss, and the last frame is not a
    site."""
    return SimpleNamespace(
        velocity_mask=torch.tensor([True, True, True, True, False]),
        velocity_target=torch.zeros(5, 2),
        time=torch.tensor([0.1, 0.25, 1.0]),
        layout=SimpleNamespace(token_frame=torch.tensor([0, 0, 1, 2, 2])),
        insertion_mask=torch.tensor([True, True, False]),
        missing=torch.tensor([3, 0, 7]),
    )


@pytest.fixture
def output():
    velocity = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0], [math.nan, 9.0]])
    return ModelOutput(velocity, torch.tensor([math.log(2.0), math.log(0.5), math.nan]))


def test_sums_cover_the_elements_of_each_bin_and_the_sites(output, pack):
    sums = observe(output, pack)
    assert sums.shape == (OBSERVED,)
    assert sums.dtype == torch.float64
    # times 0.1 (two tokens), 0.25 (one, at the start of the second bin) and 1 (one, at the end of the last bin)
    assert sums[:TIME_BINS].tolist() == [5.0, 9.0, 0.0, 2.0]
    assert sums[TIME_BINS:-2].tolist() == [4.0, 2.0, 0.0, 2.0]
    assert sums[-2:].tolist() == pytest.approx([2.5, 3.0])


def test_metrics_are_means_and_an_empty_bin_has_none(output, pack):
    metrics = observed_metrics((2 * observe(output, pack)).tolist())
    assert metrics == pytest.approx(
        {
            "loss/velocity/0-0.25": 1.25,
            "loss/velocity/0.25-0.5": 4.5,
            "loss/velocity/0.75-1": 1.0,
            "rate/predicted": 5.0,
            "rate/true": 6.0,
        }
    )


def test_observing_does_not_change_the_gradient(output, pack):
    velocity = output.velocity.clone().requires_grad_()
    assert not observe(ModelOutput(velocity, output.log_rate), pack).requires_grad
