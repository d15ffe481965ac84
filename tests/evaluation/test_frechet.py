import numpy as np
import pytest

from flowception.evaluation.frechet import Gaussian, frechet_distance


def test_one_dimension_by_hand():
    first, second = Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.array([-2.0]), np.array([[9.0]]))
    assert frechet_distance(first, second) == pytest.approx(3.0**2 + (2.0 - 3.0) ** 2)


def test_commuting_covariances_by_hand():
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    a, b = np.array([0.0, 1.0, 2.0, 5.0]), np.array([3.0, 1.0, 0.5, 0.0])
    first = Gaussian(np.zeros(4), turn @ np.diag(a) @ turn.T)
    second = Gaussian(np.full(4, 0.5), turn @ np.diag(b) @ turn.T)
    wanted = 4 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(wanted)
    assert frechet_distance(second, first) == pytest.approx(wanted)


def test_a_linear_image_is_as_far_as_the_optimal_map_says():
    """Between N(0, C) and its image under a symmetric positive map A the optimal transport is A itself."""
    generator = np.random.default_rng(1)
    factor, covariance = generator.standard_normal((3, 3)), generator.standard_normal((3, 3))
    optimal, covariance = factor @ factor.T + np.eye(3), covariance @ covariance.T
    image = Gaussian(np.zeros(3), optimal @ covariance @ optimal)
    moved = optimal - np.eye(3)
    wanted = np.trace(moved @ covariance @ moved)
    assert frechet_distance(Gaussian(np.zeros(3), covariance), image) == pytest.approx(wanted)


def test_moments_of_samples():
    samples = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    found = Gaussian.of(samples)
    assert found.mean.tolist() == [2.0, 2.0]
    assert found.covariance.tolist() == [[4.0, 3.0], [3.0, 3.0]]
    with pytest.raises(ValueError, match="at least 2 samples"):
        Gaussian.of(samples[:1])
