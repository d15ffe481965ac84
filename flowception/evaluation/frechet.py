"""Closed-form Fréchet distance between Gaussians.

``|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1^(1/2) S_2 S_1^(1/2))^(1/2))``: the squared 2-Wasserstein distance
(Dowson and Landau 1982), as in FID (arXiv 1706.08500).

Shape legend: ``K`` samples of dimension ``E``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Fréchet distance between two Gaussians.

    Args:
        mean_1: [E].
        covariance_1: [E, E], symmetric.
        mean_2: [E].
        covariance_2: [E, E], symmetric.

    Returns:
        Nonnegative up to rounding, in squared units of the data.
    """
    root = _root(covariance_1.double())
    cross = torch.linalg.eigvalsh(root @ covariance_2.double() @ root).clamp(min=0).sqrt().sum()
    traces = covariance_1.double().trace() + covariance_2.double().trace()
    return float((mean_1.double() - mean_2.double()).square().sum() + traces - 2 * cross)


def sample_frechet_distance(samples: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Fréchet distance between the Gaussian fitted to samples and a given Gaussian.

    Args:
        samples: [K, E], K at least 2.
        mean: [E], of the given Gaussian.
        covariance: [E, E], of the given Gaussian.

    Returns:
        The distance. It is positive even for true samples, see ``sampling_frechet_distance``.
    """
    if len(samples) < 2:
        raise ValueError(f"samples must be at least 2 for a covariance, got {len(samples)} samples")
    sample_covariance = torch.cov(samples.double().T).reshape(covariance.shape)
    return frechet_distance(samples.double().mean(dim=0), sample_covariance, mean, covariance)


def sampling_frechet_distance(covariance: Tensor, samples: int) -> float:
    """Expected Fréchet distance of this many true samples: the noise floor of a measurement.

    To first order in 1 / K: the mean is off by ``tr(S) / K``, the covariance by half the sum over eigenvalues a, b of
    ``a b (1 + [same]) / (a + b) / K`` (the distance's metric at S, and the variance of a sample covariance).

    Args:
        covariance: [E, E], S, positive definite.
        samples: Number of samples K.
    """
    values = torch.linalg.eigvalsh(covariance.double())
    pairs = values[:, None] * values / (values[:, None] + values)
    return float(values.sum() + 0.5 * (pairs.sum() + pairs.trace())) / samples
