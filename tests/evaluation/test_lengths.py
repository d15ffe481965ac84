import math

import numpy as np
import pytest

from flowception.evaluation.lengths import length_histogram, sampling_total_variation, total_variation


def test_histogram():
    assert length_histogram([8, 6, 8, 8]) == {6: 0.25, 8: 0.75}
    assert length_histogram([]) == {}


def test_total_variation_by_hand():
    assert total_variation({1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.5}) == 0
    assert total_variation({1: 1.0}, {2: 1.0}) == 1
    assert total_variation({1: 0.5, 2: 0.5}, {2: 0.75, 3: 0.25}) == pytest.approx(0.5)


def test_sampling_distance_matches_true_samples():
    law = {6: 0.3, 7: 0.1, 8: 0.2, 9: 0.1, 10: 0.3}
    generator = np.random.default_rng(0)
    draws = generator.choice(list(law), p=list(law.values()), size=(400, 50))
    seen = np.mean([total_variation(length_histogram(row.tolist()), law) for row in draws])
    assert math.isclose(seen, sampling_total_variation(law, 50), rel_tol=0.08)
