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


def misses(draw, trials):
    """How often the interval of a true difference of 0 lies above it, and below."""
    generator, above, below = np.random.default_rng(1), 0, 0
    for _ in range(trials):
        values = draw(generator)
        found = paired_difference(samples(values), samples([0.0] * len(values)))
        above, below = above + (found.low > 0), below + (found.high < 0)
    return above / trials, below / trials


# Each end is promised to be wrong in 2.5 % at most.
CASES = {
    "normal, 5 examples": lambda draw: draw.normal(size=5),
    "normal, 100 examples": lambda draw: draw.normal(size=100),
    "lognormal, 100 examples": lambda draw: draw.lognormal(0, 1, 100) - np.exp(0.5),
    "rarely different, 100 examples": lambda draw: np.sign(np.floor(draw.uniform(-0.03, 1.03, 100))),
}


def test_each_end_of_the_interval_is_wrong_as_rarely_as_it_says_for_few_examples_too():
    # The plain percentile interval has 8 % for five normal examples.
    assert max(misses(CASES["normal, 5 examples"], 300)) <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 300)


def test_the_interval_is_longer_where_the_differences_have_their_tail():
    generator = np.random.default_rng(0)
    values = generator.lognormal(0, 1, 100)
    found = paired_difference(samples(values), samples([0.0] * 100))
    resampled = generator.choice(values, (10_000, 100)).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    # An outlier that is not among these examples would move the mean up, not down.
    assert found.high > high + 0.05 * (high - low)
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))


@pytest.mark.proof
@pytest.mark.parametrize(("case", "most"), list(zip(CASES, (0.025, 0.025, 0.046, 0.025), strict=True)))
def test_the_rate_of_wrong_ends_by_many_trials(case, most):
    """What is left beyond 2.5 % is the error for a skewness of 6; three standard errors of counting on top."""
    assert max(misses(CASES[case], 10_000)) <= most + 3 * np.sqrt(most / 10_000)


def test_copies_of_an_example_tell_nothing_new():
    values = np.random.default_rng(0).normal(0.3, 1, 40)
    once = paired_difference(samples(values), samples([0.0] * 40))
    copies = np.repeat(values, 5)
    blind = paired_difference(samples(copies), samples([0.0] * 200))
    seeing = paired_difference(samples(copies), samples([0.0] * 200), clusters=list(np.repeat(range(40), 5)))
    assert blind.high - blind.low < 0.6 * (once.high - once.low)
    assert (seeing.low, seeing.high) == pytest.approx((once.low, once.high))
    assert (seeing.n, seeing.clusters) == (200, 40)


def test_a_far_tail_is_that_of_students_t():
    values = np.random.default_rng(0).normal(0, 1, 400)
    found = paired_difference(samples(values), samples([0.0] * 400), confidence=1 - 0.05 / 1000)
    half = 4.06 * values.std(ddof=1) / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)


def test_one_cluster_has_a_difference_and_no_interval():
    found = paired_difference(samples([1, 2]), samples([0, 0]), clusters=["a", "a"])
    assert (found.value, found.low, found.high) == (1.5, None, None)
    assert found.text == "+1.5 no interval (n = 2 in 1 clusters)"


def test_means_over_tokens_are_ratios_in_each_resample():
    a = [Sample(total=10, weight=10), Sample(total=1, weight=1)]
    b = [Sample(total=20, weight=10), Sample(total=1, weight=1)]
    assert paired_difference(a, b).value == pytest.approx(11 / 11 - 21 / 11)


def test_examples_that_count_for_one_only_are_left_out_of_both():
    found = paired_difference([Sample(total=1.0), NOT_COUNTED], [Sample(total=3.0), Sample(total=100.0)])
    assert (found.value, found.n) == (-2.0, 1)


def test_no_example_and_no_finite_difference_are_not_defined():
    assert paired_difference([], []) == Difference(value=None, low=None, high=None, n=0, clusters=0)
    assert paired_difference(samples([1, float("nan")]), samples([1, 1])).value is None
    with pytest.raises(ValueError, match="paired examples are needed, got 1 and 0"):
        paired_difference(samples([1]), [])


def test_equal_arguments_give_equal_intervals_and_equal_models_no_difference():
    values = samples(range(50))
    assert paired_difference(values, values) == Difference(value=0.0, low=0.0, high=0.0, n=50, clusters=50)
    other = samples(reversed(range(50)))
    assert paired_difference(values, other) == paired_difference(values, other)
    assert paired_difference(values, other, confidence=0.9) != paired_difference(values, other)
