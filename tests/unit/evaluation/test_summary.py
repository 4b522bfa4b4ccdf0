from __future__ import annotations

import math

import numpy as np
import pytest

from rankwise.evaluation.metrics import MetricValue, SeedMean, from_tracking, over_seeds, to_tracking


def test_values_come_back_from_tracking_as_they_went():
    metrics = {
        "eval.loss": MetricValue(value=1.5, stderr=0.1, n=20),
        "eval.exact_match": MetricValue(value=1.0, stderr=None, n=1),
        "eval.mean_absolute_error": MetricValue(value=None, stderr=None, n=0),
    }
    flat = to_tracking(metrics)
    assert flat == {
        "eval.loss": 1.5,
        "eval.loss.stderr": 0.1,
        "eval.loss.n": 20.0,
        "eval.exact_match": 1.0,
        "eval.exact_match.n": 1.0,
        "eval.mean_absolute_error.n": 0.0,
    }
    assert from_tracking(flat) == metrics


def test_other_metrics_of_a_run_are_no_evaluation_results():
    assert from_tracking({"train.loss": 1.0, "eval.loss": 2.0, "train.n": 3.0}) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_mlflow_is_not_defined(bad):
    flat = {"eval.loss": bad, "eval.loss.stderr": bad, "eval.loss.n": 5.0, "eval.other": 1.0, "eval.other.n": bad}
    assert from_tracking(flat) == {"eval.loss": MetricValue(value=None, stderr=None, n=5)}


def test_one_seed_keeps_its_error_and_has_no_spread():
    value = MetricValue(value=1.5, stderr=0.1, n=20)
    assert over_seeds([value]) == SeedMean(value=1.5, spread=None, stderr=0.1, seeds=1)


def test_no_seed_with_a_value_has_no_mean():
    assert over_seeds([]) is None
    assert over_seeds([MetricValue(value=None, stderr=None, n=5)]) is None


def test_a_seed_without_a_value_does_not_count():
    summary = over_seeds([MetricValue(value=None, stderr=None, n=5), MetricValue(value=2.0, stderr=0.5, n=5)])
    assert summary == SeedMean(value=2.0, spread=None, stderr=0.5, seeds=1)


def test_the_error_over_seeds_covers_a_simulation_in_which_all_seeds_see_the_same_examples():
    rng = np.random.default_rng(0)
    seeds, examples, tries = 4, 50, 2000
    of_seeds = rng.normal(0, 0.3, (tries, seeds, 1))
    of_examples = rng.normal(0, 1.0, (tries, 1, examples))
    rest = rng.normal(0, 0.2, (tries, seeds, examples))
    results = of_seeds + of_examples + rest
    means = results.mean(axis=2)
    errors = results.std(axis=2, ddof=1) / np.sqrt(examples)
    claimed = [
        over_seeds([MetricValue(value=m, stderr=e, n=examples) for m, e in zip(row, error, strict=True)]).stderr ** 2
        for row, error in zip(means, errors, strict=True)
    ]
    actual = means.mean(axis=1).var()
    assert actual == pytest.approx(0.3**2 / 4 + 1.0 / 50, rel=0.1)
    assert np.mean(claimed) == pytest.approx(actual, rel=0.1)
