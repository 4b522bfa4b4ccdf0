"""The loss of each source: a mean over its rows, with pairs and columns like every other mean."""

import pytest

from rankwise.evaluation.evaluate import Evaluation, prediction_rows
from rankwise.evaluation.gate import decide
from rankwise.evaluation.metrics import Observation, compute, find_metrics, metrics_of
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import PromotionSpec


def observations(loss=1.0):
    return [
        Observation(
            id=str(number), prompt=f"p{number}", reference="x", source="ab"[number % 2], tokens=2, correct_tokens=1,
            loss_sum=loss * (1 + number % 2) + 0.01 * number,
        )
        for number in range(40)
    ]  # fmt: skip


def test_each_source_has_a_mean_of_its_own():
    values = compute(metrics_of(["loss", "token_accuracy"], observations()), observations())
    assert (values["eval.loss"].n, values["eval.loss.a"].n, values["eval.loss.b"].n) == (40, 20, 20)
    assert values["eval.loss.a"].value == pytest.approx((1 + 0.01 * 19) / 2)
    assert values["eval.loss.b"].value == pytest.approx((2 + 0.01 * 20) / 2)
    assert values["eval.loss"].value == pytest.approx((values["eval.loss.a"].value + values["eval.loss.b"].value) / 2)
    assert "eval.token_accuracy.a" not in values


def test_rows_of_one_source_have_no_such_means():
    plain = [Observation(id="0", prompt="p", reference="x", loss_sum=1.0, tokens=2, correct_tokens=1)]
    assert metrics_of(["loss"], plain) == find_metrics(["loss"])


def test_the_table_of_predictions_has_a_column_for_each():
    rows = prediction_rows(Evaluation(adapter=None, metrics={}, observations=tuple(observations())), ["loss"])
    assert rows[0]["eval.loss.a"] == rows[0]["eval.loss"]
    assert rows[0]["eval.loss.b"] is None


def test_the_gate_reads_them():
    spec = PromotionSpec(metric="eval.loss.a", max_regression={"eval.loss.b": 0.1}, min_examples=1)
    options = {"spec": spec, "metrics": ["loss"], "primary_metric": "eval.loss", "overlapping": 0}
    better = decide(observations(0.5), observations(), observations(2.0), **options)
    assert better.passed, better
    assert {check.metric for check in better.checks} >= {"eval.loss.a", "eval.loss.b"}
    other = PromotionSpec(metric="eval.loss.c")
    with pytest.raises(
        ConfigError, match=r"eval\.loss\.c is not a mean of the metrics loss; use one of .*eval\.loss\.b"
    ):
        decide(observations(), None, None, **{**options, "spec": other})
