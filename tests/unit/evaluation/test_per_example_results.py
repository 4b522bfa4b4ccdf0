from __future__ import annotations

import numpy as np
import pytest

from rankwise.evaluation.gather import influences
from rankwise.evaluation.metrics import MetricValue, Sample, weighted_mean

COLUMNS = ["id", "supervised_tokens", "eval.loss", "eval.exact_match", "eval.mean_absolute_error"]
ROWS = [["a", 2, 1.0, 1.0, None], ["b", 6, 2.0, 0.0, 5.0], ["c", 4, 4.0, 0.0, 7.0]]
TABLE = {"columns": COLUMNS, "data": ROWS}


def test_a_mean_over_tokens_is_weighted_by_them():
    mean = weighted_mean([Sample(total=row[2] * row[1], weight=row[1]) for row in ROWS])
    found = influences(TABLE, "eval.loss", mean)
    assert found.ids == ("a", "b", "c")
    assert found.values == pytest.approx([2 * (1 - 2.5) / 12, 6 * (2 - 2.5) / 12, 4 * (4 - 2.5) / 12])
    # They have the standard error that the metric itself states.
    assert np.sqrt(3 / 2 * np.sum(found.values**2)) == pytest.approx(mean.stderr)


def test_a_mean_over_examples_is_not_weighted():
    mean = weighted_mean([Sample(total=row[3]) for row in ROWS])
    assert influences(TABLE, "eval.exact_match", mean).values == pytest.approx([2 / 9, -1 / 9, -1 / 9])


def test_examples_that_do_not_count_are_left_out():
    found = influences(TABLE, "eval.mean_absolute_error", MetricValue(value=6.0, stderr=1.0, n=2))
    assert found.ids == ("b", "c")
    assert found.values == pytest.approx([-0.5, 0.5])


def test_examples_with_one_prompt_have_one_influence():
    rows = [["a", "a", 1.0], ["b", "b", 2.0], ["c", "a", 6.0]]
    table = {"columns": ["id", "group", "eval.exact_match"], "data": rows}
    found = influences(table, "eval.exact_match", MetricValue(value=3.0, stderr=1.0, n=3))
    assert found.ids == ("a", "b")
    assert found.values == pytest.approx([(1 - 3 + 6 - 3) / 3, (2 - 3) / 3])
    # They have the standard error that the metric itself states.
    mean = weighted_mean([Sample(total=row[2]) for row in rows], [row[1] for row in rows])
    assert np.sqrt(2 / 1 * np.sum(found.values**2)) == pytest.approx(mean.stderr)


def test_a_table_that_does_not_give_back_the_logged_mean_does_not_count():
    assert influences(TABLE, "eval.loss", MetricValue(value=2.4, stderr=0.1, n=3)) is None
    assert influences(TABLE, "eval.loss", MetricValue(value=2.5, stderr=0.1, n=4)) is None
    assert influences(TABLE, "eval.other", MetricValue(value=2.5, stderr=0.1, n=3)) is None
    assert influences({"columns": COLUMNS, "data": []}, "eval.loss", MetricValue(value=None, stderr=None, n=0)) is None
