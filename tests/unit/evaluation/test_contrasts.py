"""The numbers behind the answer against scipy and against hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rankwise.evaluation.contrasts import (
    ENOUGH,
    NOT_ENOUGH,
    UNDECIDED,
    Tails,
    contrast,
    effective_clusters,
    limits,
    outcomes,
)

DRAW = np.random.default_rng(0)


def of_rows(results):
    """Values, influences and shares of (K, S, n) results of rows with equal weights."""
    means = results.mean(axis=-1)
    n = results.shape[-1]
    return means, (results - means[..., None]) / n, np.full(n, 1 / n)


def no_rows(values):
    """Influences and shares of 50 rows that differ in nothing."""
    return np.zeros((*values.shape, 50)), np.full(50, 1 / 50)


def test_of_two_ranks_without_row_noise_it_is_the_paired_t_test():
    values = DRAW.normal(size=(2, 6)) + DRAW.normal(size=6)
    made = contrast(values, *no_rows(values))
    low, high = limits(made, 0.025, 0.025, width=0.0)
    expected = stats.ttest_rel(values[0], values[1]).confidence_interval(0.95)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))


def test_of_one_kind_of_noise_over_rows_it_is_near_the_t_interval_and_never_inside():
    results = np.zeros((2, 3, 200))
    results[0] = DRAW.normal(size=200)
    made = contrast(*of_rows(results))
    low, high = limits(made, 0.025, 0.025)
    expected = stats.ttest_1samp(results[0, 0], 0.0).confidence_interval(0.95)
    assert low[0] < expected.low < expected.high < high[0]
    assert high[0] - low[0] == pytest.approx(expected.high - expected.low, rel=0.12)


def test_the_variance_is_that_of_a_two_way_layout():
    seeds, rows = 4, 30
    results = DRAW.normal(size=(2, seeds, rows)) + DRAW.normal(size=(2, seeds, 1)) + DRAW.normal(size=(2, 1, rows))
    made = contrast(*of_rows(results))
    table = results[0] - results[1]
    grand, by_seed, by_row = table.mean(), table.mean(axis=1), table.mean(axis=0)
    of_seeds = rows * np.sum((by_seed - grand) ** 2) / (seeds - 1)
    of_rows_ = seeds * np.sum((by_row - grand) ** 2) / (rows - 1)
    residual = table - by_seed[:, None] - by_row + grand
    of_cells = np.sum(residual**2) / (seeds - 1) / (rows - 1)
    # The jackknife divides by one more (n - 1) / n.
    expected = (of_seeds + of_rows_ - of_cells) / (seeds * rows)
    assert made.variance[0] == pytest.approx(expected, rel=2 / rows)
    assert made.difference[0] == pytest.approx(grand)


def test_seeds_are_pooled_over_ranks_with_equal_noise_only():
    values = DRAW.normal(size=(4, 5))
    values = (values - values.mean(axis=1, keepdims=True)) / values.std(axis=1, ddof=1, keepdims=True)
    made = contrast(values, *no_rows(values))
    assert made.pooled.all()
    assert set(made.seed_freedom) == {12.0}
    assert len(set(made.seed_variance)) == 1
    noisy = values * np.array([1.0, 1.0, 30.0, 1.0])[:, None]
    made = contrast(noisy, *no_rows(noisy))
    assert not made.pooled.any()
    assert set(made.seed_freedom) == {4.0}
    assert made.seed_variance[2] > 50 * made.seed_variance[0]


def test_only_seeds_of_both_ranks_count():
    values = np.array([[1.0, np.nan, 3.0, 4.0], [5.0, 5.0, 5.0, np.nan], [0.0, 0.0, 0.0, 0.0]])
    made = contrast(values, *no_rows(values))
    assert list(made.seeds) == [3, 3]
    assert list(made.difference) == pytest.approx([8 / 3, 5.0])
    alone = np.array([[1.0, np.nan], [0.0, 0.0]])
    _, high = limits(contrast(alone, *no_rows(alone)), 0.025, 0.025, width=1.0)
    assert high[0] == np.inf


def test_many_sweeps_at_once_are_the_same_as_one_by_one():
    results = DRAW.normal(size=(7, 3, 4, 25))
    values, influences, shares = of_rows(results)
    many = limits(contrast(values, influences, shares), 0.02, 0.01)
    for at in range(7):
        one = limits(contrast(values[at], influences[at], shares), 0.02, 0.01)
        assert np.allclose([end[at] for end in many], one)


def test_kish_counts_clusters_by_their_weights():
    assert effective_clusters(np.full(40, 1 / 40)) == pytest.approx(40)
    shares = np.array([30, *[1] * 30]) / 60
    assert effective_clusters(shares) == pytest.approx(3600 / 930)


def test_a_limit_moves_out_on_the_side_of_the_tail():
    results = np.zeros((2, 3, 60))
    results[0] = DRAW.lognormal(size=60)
    made = contrast(*of_rows(results))
    low, high = limits(made, 0.02, 0.02)
    assert high[0] - made.difference[0] > 1.3 * (made.difference[0] - low[0])
    results[0] *= -1
    made = contrast(*of_rows(results))
    low, high = limits(made, 0.02, 0.02)
    assert made.difference[0] - low[0] > 1.3 * (high[0] - made.difference[0])


def test_rows_without_any_difference_have_the_limit_of_what_was_not_seen():
    results = np.broadcast_to(DRAW.integers(0, 2, 50).astype(float), (2, 3, 50))
    made = contrast(*of_rows(results))
    assert made.all_tied.all()
    _, high = limits(made, 0.02, 0.02, width=1.0)
    assert high[0] == pytest.approx(-np.log(0.02) / 50)
    _, unknown = limits(made, 0.02, 0.02)
    assert unknown[0] == np.inf


def test_values_chosen_among_several_widen_the_part_of_the_rows():
    results = DRAW.normal(size=(2, 4, 40))
    made = contrast(*of_rows(results))
    assert limits(made, 0.02, 0.02, candidates=4)[1][0] > limits(made, 0.02, 0.02)[1][0]


def codes(lower, upper, **options):
    return list(outcomes(np.array(lower), np.array(upper), 1.0, **options))


def test_ranks_are_tested_from_large_to_small_up_to_the_first_that_fails():
    assert codes([-1, -1, -1], [0.5, 0.9, 1.0]) == [ENOUGH] * 3
    assert codes([-1, -1, -1], [0.5, 1.1, 0.5]) == [UNDECIDED, UNDECIDED, ENOUGH]
    assert codes([2, 1.5, -1], [3, 3, 1.1]) == [NOT_ENOUGH, NOT_ENOUGH, UNDECIDED]


def test_a_rank_that_may_not_be_called_enough_does_not_stop_the_others():
    assert codes([-1, -1], [0.5, 0.5], may_be_enough=np.array([True, False])) == [ENOUGH, UNDECIDED]
    assert codes([2, 2], [3, 3], may_be_worse=np.array([True, False])) == [NOT_ENOUGH, UNDECIDED]


def test_an_earlier_look_keeps_what_it_decided():
    before = np.array([NOT_ENOUGH, UNDECIDED, ENOUGH], dtype=np.int8)
    assert codes([-1, -1, -1], [0.5, 0.5, 5.0], before=before) == [NOT_ENOUGH, ENOUGH, ENOUGH]


def test_the_error_is_halved_and_divided_over_looks_and_ranks():
    assert Tails.of(0.95, 3, 2) == Tails(upper=pytest.approx(0.0125), lower=pytest.approx(0.0125 / 3))
    assert Tails.of(0.9, 1, 1) == Tails(upper=pytest.approx(0.05), lower=pytest.approx(0.05))
