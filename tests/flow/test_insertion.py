"""Insertion rules: their means, their ranges, and the distributions they are built from."""

import math

import numpy as np
import pytest
import torch

from flowception.flow.insertion import (
    INSERTION_RULES,
    bernoulli,
    binomial_quantile,
    poisson_quantile,
    thinning,
    whole_counts,
)

GRID = (np.arange(100_000) + 0.5) / 100_000
TRIALS = 20_000


@pytest.mark.parametrize(("trials", "p"), [(1, 0.3), (7, 0.02), (19, 0.5), (40, 0.97), (0, 0.5), (3000, 0.9)])
def test_binomial_quantile(trials, p):
    counts = binomial_quantile(np.full(len(GRID), trials), p, GRID)
    law = torch.distributions.Binomial(trials, torch.tensor(p, dtype=torch.float64))
    expected = law.log_prob(torch.arange(trials + 1).double()).exp().numpy()
    seen = np.bincount(counts, minlength=trials + 1) / len(GRID)
    assert np.abs(seen - expected).max() < 2e-5
    assert (np.diff(counts) >= 0).all()


def test_binomial_ends():
    trials = np.array([0, 3, 9])
    u = np.array([0.0, 0.5, np.nextafter(1, 0)])
    assert binomial_quantile(trials, 1.0, u).tolist() == [0, 3, 9]
    assert binomial_quantile(trials, 0.0, u).tolist() == [0, 0, 0]
    assert (binomial_quantile(trials, 0.5, u) <= trials).all()


@pytest.mark.parametrize("mean", [0.0, 0.02, 1.0, 11.5, 900.0])
def test_poisson_quantile(mean):
    counts = poisson_quantile(np.full(len(GRID), mean), GRID)
    support = np.arange(counts.max() + 1)
    log_mass = [k * math.log(mean) - mean - math.lgamma(k + 1) if mean else (0 if k == 0 else -np.inf) for k in support]
    assert np.abs(np.bincount(counts) / len(GRID) - np.exp(log_mass)).max() < 2e-5


def sites(rates, may_insert=None, clips=TRIALS, seed=0):
    """The same clip many times, with independent uniforms."""
    rates, per_clip = np.tile(np.asarray(rates, dtype=np.float64), clips), len(rates)
    allowed = np.tile(may_insert, clips) if may_insert is not None else np.ones(len(rates), dtype=bool)
    uniforms = np.random.default_rng(seed).random((len(rates), 2))
    return rates, np.arange(clips + 1) * per_clip, allowed, uniforms


@pytest.mark.parametrize("rule", list(INSERTION_RULES))
@pytest.mark.parametrize("p", [0.05, 0.4])
def test_every_rule_inserts_rate_times_p_on_average_and_only_where_it_may(rule, p):
    rates, may = [0.7, 2.2, 5.0, 0.0, 1.1], np.array([True, True, False, True, True])
    flat, cu_frames, allowed, uniforms = sites(rates, may)
    counts = INSERTION_RULES[rule](flat, cu_frames, allowed, p, uniforms).reshape(TRIALS, 5)
    expected = np.where(may, rates, 0) * p
    assert counts.min() >= 0
    assert counts[:, 2].max() == 0
    assert counts[:, 3].max() == 0
    # Standard error of a count's mean is at most sqrt(2.2 * 0.4 / 20,000) = 0.0066.
    assert np.abs(counts.mean(axis=0) - expected).max() < 0.03


def test_bernoulli_inserts_at_most_one():
    counts = bernoulli(*sites([0.5, 30.0])[:3], 0.5, sites([0.5, 30.0])[3])
    assert set(counts.tolist()) == {0, 1}
    assert (counts.reshape(-1, 2)[:, 1] == 1).all()


def test_whole_counts_worked_example():
    # Running sums 0.5, 0.5 (may not insert), 1.75, 4.0; plus U = 0.5: 1.0, 1.0, 2.25, 4.5; plus U = 0: as they are.
    rates = np.tile([0.5, 9.0, 1.25, 2.25], 2)
    may = np.tile([True, False, True, True], 2)
    counts = whole_counts(rates, np.array([0, 4, 8]), may, np.array([0.5, 0.0]))
    assert counts.tolist() == [1, 0, 1, 2, 0, 0, 1, 3]


def test_whole_counts_round_each_rate_and_each_total():
    rates = np.random.default_rng(1).random(9) * 3
    flat, cu_frames, allowed, uniforms = sites(rates)
    counts = whole_counts(flat, cu_frames, allowed, uniforms[cu_frames[:-1], 0]).reshape(TRIALS, 9)
    assert ((counts == np.floor(rates)) | (counts == np.ceil(rates))).all()
    total = counts.sum(axis=1)
    assert set(total.tolist()) == {math.floor(rates.sum()), math.ceil(rates.sum())}
    assert np.abs(counts.mean(axis=0) - rates).max() < 0.015


def test_thinning_at_the_last_step_inserts_exactly_the_missing_frames():
    flat, cu_frames, allowed, uniforms = sites([3.0, 0.0, 7.0], clips=500)
    assert (thinning(flat, cu_frames, allowed, 1.0, uniforms).reshape(500, 3) == [3, 0, 7]).all()


@pytest.mark.parametrize("rule", list(INSERTION_RULES))
def test_a_clip_does_not_depend_on_its_neighbors(rule):
    generator = np.random.default_rng(2)
    sizes = generator.integers(1, 12, 60)
    cu_frames = np.concatenate([[0], np.cumsum(sizes)])
    rates, may = generator.random(cu_frames[-1]) * 4, generator.random(cu_frames[-1]) < 0.8
    uniforms = generator.random((cu_frames[-1], 2))
    together = INSERTION_RULES[rule](rates, cu_frames, may, 0.3, uniforms)
    for clip in range(60):
        here = slice(cu_frames[clip], cu_frames[clip + 1])
        alone = INSERTION_RULES[rule](rates[here], np.array([0, sizes[clip]]), may[here], 0.3, uniforms[here])
        assert np.array_equal(alone, together[here])
