"""Intervals and p against SciPy's, on a ratio of sums as scores are."""

import numpy as np
import pytest
from scipy import stats

from segfit.report.evaluation import compare, intervals, summed

RANDOM = np.random.default_rng(0)
FIRST = np.stack([RANDOM.integers(20, 60, 30), RANDOM.integers(60, 100, 30)], 1).astype(float)
SECOND = FIRST - [1.5, 0] + np.stack([RANDOM.integers(-6, 7, 30), np.zeros(30)], 1)


def scores(sums):
    return {"ratio": sums[:, 0] / sums[:, 1]}


def ratio(*counts, axis=-1):
    return counts[0].sum(axis) / counts[1].sum(axis)


def test_an_interval_is_that_of_scipy():
    found = intervals(FIRST, scores, 4_000)["ratio"]
    expected = stats.bootstrap(
        (*FIRST.T,), ratio, paired=True, vectorized=True, method="percentile", n_resamples=4_000,
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found == pytest.approx(expected, abs=4e-3)
    assert np.isnan(intervals(FIRST[:1], scores, 10)["ratio"]).all()


def test_a_difference_is_that_of_scipy():
    value, interval, p = compare(FIRST, SECOND, scores, 4_000)["ratio"]

    def difference(first, second, axis=-1):
        return (first.sum(axis) - second.sum(axis)) / FIRST[:, 1].sum()

    pair = FIRST[:, 0], SECOND[:, 0]
    assert value == pytest.approx(difference(*pair))
    options = {"vectorized": True, "n_resamples": 4_000, "rng": np.random.default_rng(1)}
    expected = stats.permutation_test(pair, difference, permutation_type="samples", **options)
    assert 0.001 < p < 0.5
    assert p == pytest.approx(expected.pvalue, abs=0.02)

    def both(first, second, total, axis=-1):
        return (first.sum(axis) - second.sum(axis)) / total.sum(axis)

    drawn = stats.bootstrap((*pair, FIRST[:, 1]), both, paired=True, method="percentile", **options)
    assert interval == pytest.approx(drawn.confidence_interval, abs=4e-3)


def test_a_model_does_not_differ_from_itself():
    assert compare(FIRST, FIRST, scores, 99)["ratio"] == (0, (0, 0), 1)


def test_a_group_counts_as_one():
    counts = {2: np.array([1, 2]), 0: np.array([3, 4]), 3: np.array([5, 6])}
    assert summed(counts, ["b", "a", "a", "b"]).tolist() == [[1, 2], [8, 10]]
