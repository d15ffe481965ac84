"""The Frechet distance between two Gaussians in closed form, as in FID and FVD.

``|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^(1/2) C_2 C_1^(1/2))^(1/2))``, the squared Wasserstein-2 distance (Dowson and
Landau 1982). Of samples it sees the first two moments only.

Shape legend: ``m`` samples, ``D`` dimensions; all float64.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray


class Gaussian:
    """Mean [D] and covariance [D, D]."""

    def __init__(self, mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> None:
        self.mean, self.covariance = mean, covariance

    @classmethod
    def of(cls, samples: NDArray[np.float64]) -> Self:
        """The moments of samples [m, D].

        Raises:
            ValueError: If there are fewer than two.
        """
        if len(samples) < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {len(samples)}")
        return cls(samples.mean(axis=0), np.cov(samples, rowvar=False, ddof=1).reshape(samples.shape[1], -1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Distance between two Gaussians, at least 0 up to rounding."""
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second.covariance @ root).clip(min=0)).sum()
    gap = first.mean - second.mean
    return float(gap @ gap + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)
