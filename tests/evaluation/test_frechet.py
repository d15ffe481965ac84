"""Fréchet distance: one dimension by hand, commuting covariances, rotations, and the noise floor."""

import pytest
import torch

from flowception.evaluation.frechet import frechet_distance, sample_frechet_distance, sampling_frechet_distance


def test_one_dimension_by_hand():
    """``(m_1 - m_2)^2 + (s_1 - s_2)^2``."""
    distance = frechet_distance(torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([3.0]), torch.tensor([[9.0]]))
    assert distance == pytest.approx(4 + 1)


def test_diagonal_covariances_add_up_and_rotations_have_no_effect():
    first, second = torch.tensor([1.0, 4.0, 9.0]).double().diag(), torch.tensor([4.0, 4.0, 0.0]).double().diag()
    zero = torch.zeros(3, dtype=torch.float64)
    assert frechet_distance(zero, first, zero, second) == pytest.approx(1 + 0 + 9)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    turned = frechet_distance(zero, turn @ first @ turn.T, zero, turn @ second @ turn.T)
    assert turned == pytest.approx(10, abs=1e-6)
    assert frechet_distance(zero, first, zero, first) == pytest.approx(0, abs=1e-9)


def test_the_floor_matches_true_samples():
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double()
    mean = torch.tensor([0.0, 2.0]).double()
    generator = torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(covariance)
    seen = [
        sample_frechet_distance(
            mean + torch.randn(500, 2, dtype=torch.float64, generator=generator) @ root.T, mean, covariance
        )
        for _ in range(1000)
    ]
    assert sampling_frechet_distance(covariance, 500) == pytest.approx(sum(seen) / 1000, rel=0.15)
    with pytest.raises(ValueError, match="at least 2 .*, got 1 samples"):
        sample_frechet_distance(torch.zeros(1, 2), mean, covariance)
