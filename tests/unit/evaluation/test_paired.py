from __future__ import annotations

import numpy as np
import pytest

from rankwise.evaluation.metrics import NOT_COUNTED, Sample
from rankwise.evaluation.paired import Difference, paired_difference


def samples(values):
    return [Sample(total=float(value)) for value in values]


def test_the_interval_is_that_of_the_difference_not_of_the_means():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 100, 400)
    a, b = hard + generator.normal(1, 1, 400), hard + generator.normal(0, 1, 400)
    found = paired_difference(samples(a), samples(b))
    assert found.n == 400
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert 0 < found.low < found.value < found.high
    # Two standard errors of the differences, each way: a tenth of what unpaired means would give.
    assert found.high - found.low == pytest.approx(2 * 1.96 * (a - b).std() / 20, rel=0.1)


def test_the_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        a, b = generator.exponential(2, 60), generator.exponential(2, 60)
        found = paired_difference(samples(a), samples(b), resamples=400, seed=trial)
        covered += found.low <= 0 <= found.high
    assert 180 <= covered <= 199


def test_means_over_tokens_are_ratios_in_each_resample():
    a = [Sample(total=10, weight=10), Sample(total=1, weight=1)]
    b = [Sample(total=20, weight=10), Sample(total=1, weight=1)]
    assert paired_difference(a, b).value == pytest.approx(11 / 11 - 21 / 11)


def test_examples_that_count_for_one_only_are_left_out_of_both():
    found = paired_difference([Sample(total=1.0), NOT_COUNTED], [Sample(total=3.0), Sample(total=100.0)])
    assert (found.value, found.n) == (-2.0, 1)


def test_no_example_and_no_finite_difference_are_not_defined():
    assert paired_difference([], []) == Difference(value=None, low=None, high=None, n=0)
    assert paired_difference(samples([1, float("nan")]), samples([1, 1])).value is None
    with pytest.raises(ValueError, match="paired examples are needed, got 1 and 0"):
        paired_difference(samples([1]), [])


def test_equal_arguments_give_equal_intervals_and_equal_models_no_difference():
    values = samples(range(50))
    assert paired_difference(values, values) == Difference(value=0.0, low=0.0, high=0.0, n=50)
    other = samples(reversed(range(50)))
    assert paired_difference(values, other) == paired_difference(values, other)
    assert paired_difference(values, other) != paired_difference(values, other, seed=1)
