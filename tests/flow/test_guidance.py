"""Guidance of velocity and rate."""

import torch

from flowception.flow.guidance import Prediction, guide


def test_guidance_worked_example():
    conditional = Prediction(torch.full((2, 1, 1, 1), 3.0), torch.log(torch.tensor([4.0, 2.0])))
    unconditional = Prediction(torch.full((2, 1, 1, 1), 1.0), torch.log(torch.tensor([2.0, 2.0])))
    guided = guide(conditional, unconditional, scale=4.0, insertion_scale=3.0)
    assert guided.velocity.flatten().tolist() == [9.0, 9.0]
    torch.testing.assert_close(guided.log_rate.exp(), torch.tensor([16.0, 2.0]))


def test_scales_one_and_zero_are_the_two_predictions():
    conditional, unconditional = (Prediction(torch.randn(3, 2, 2, 2), torch.randn(3)) for _ in range(2))
    ones = guide(conditional, unconditional, 1.0)
    assert torch.equal(ones.velocity, conditional.velocity)
    assert torch.equal(ones.log_rate, conditional.log_rate)
    zeros = guide(conditional, unconditional, 0.0, 0.0)
    assert torch.equal(zeros.velocity, unconditional.velocity)
    assert torch.equal(zeros.log_rate, unconditional.log_rate)
