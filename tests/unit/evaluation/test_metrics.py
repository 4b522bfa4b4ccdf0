from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.example_package import install_example_metrics

from rankwise.evaluation import metrics as module
from rankwise.evaluation.metrics import (
    MetricValue,
    Observation,
    Sample,
    compute,
    find_metrics,
    metric,
    scores,
    weighted_mean,
)
from rankwise.exceptions import ConfigError
from rankwise.experiment.metric_names import METRIC_KEYS, metric_facts

ONE = Observation(id="0", prompt="p", reference="Price is $100", loss_sum=4.0, tokens=4, correct_tokens=2)


def observed(*predictions: str, reference: str = "Price is $100") -> list[Observation]:
    return [replace(ONE, id=str(index), prediction=text, reference=reference) for index, text in enumerate(predictions)]


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))


def test_built_in_metrics_agree_with_the_table_that_the_schema_reads():
    for name in METRIC_KEYS:
        (found,) = find_metrics([name])
        assert (found.keys, tuple(found.derived)) == (metric_facts(name).keys, metric_facts(name).derived)
        assert found.greater_is_better == metric_facts(name).greater_is_better
        assert found.needs_generation == metric_facts(name).needs_generation


def test_loss_weighs_tokens_and_takes_examples_as_clusters_for_its_error():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 40)
    sums = tokens * rng.normal(2.0, 0.5, 40)
    observations = [
        replace(ONE, prompt=str(at), loss_sum=s, tokens=int(t))
        for at, (s, t) in enumerate(zip(sums, tokens, strict=True))
    ]
    values = compute(find_metrics(["loss"]), observations)
    mean = sums.sum() / tokens.sum()
    assert values["eval.loss"].value == pytest.approx(mean)
    assert values["eval.loss"].n == 40
    # A cluster bootstrap is an independent way to the same standard error.
    drawn = rng.integers(0, 40, (20000, 40))
    bootstrap = (sums[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert values["eval.loss"].stderr == pytest.approx(bootstrap, rel=0.05)
    assert values["eval.perplexity"].value == pytest.approx(math.exp(mean))
    assert values["eval.perplexity"].stderr == pytest.approx(math.exp(mean) * values["eval.loss"].stderr)


def test_equal_weights_give_the_usual_standard_error():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    result = weighted_mean([Sample(total=value) for value in values])
    assert result.value == pytest.approx(values.mean())
    assert result.stderr == pytest.approx(values.std(ddof=1) / 2)


def test_examples_with_one_prompt_are_one_measurement():
    rng = np.random.default_rng(0)
    once = [
        replace(ONE, id=str(at), prompt=str(at), loss_sum=loss, tokens=2)
        for at, loss in enumerate(rng.normal(4, 1, 30))
    ]
    copies = [replace(each, id=f"{each.id}.{copy}") for each in once for copy in range(9)]
    one, nine = (compute(find_metrics(["loss"]), each)["eval.loss"] for each in (once, copies))
    assert (one.n, nine.n) == (30, 270)
    assert (nine.value, nine.stderr) == pytest.approx((one.value, one.stderr))
    assert weighted_mean([Sample(total=1.0), Sample(total=2.0)], ["a", "a"]) == MetricValue(value=1.5, stderr=None, n=2)


def test_one_example_has_a_value_and_no_error():
    assert weighted_mean([Sample(total=3.0)]) == MetricValue(value=3.0, stderr=None, n=1)


def test_no_examples_give_none_for_every_key_and_json_takes_it():
    values = compute(find_metrics(METRIC_KEYS), [])
    assert set(values) == {key for keys in METRIC_KEYS.values() for key in keys}
    assert set(values.values()) == {MetricValue(value=None, stderr=None, n=0)}
    json.dumps([value.to_json() for value in values.values()], allow_nan=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_mean_that_is_not_finite_is_none_but_counts_its_examples(bad):
    values = compute(find_metrics(["loss"]), [ONE, replace(ONE, loss_sum=bad)])
    assert values["eval.loss"] == MetricValue(value=None, stderr=None, n=2)
    assert values["eval.perplexity"] == MetricValue(value=None, stderr=None, n=2)


def test_a_perplexity_too_large_for_a_float_is_none():
    values = compute(find_metrics(["loss"]), [replace(ONE, loss_sum=4000.0)] * 2)
    assert values["eval.loss"].value == 1000.0
    assert values["eval.perplexity"].value is None


def test_squares_too_large_for_a_float_leave_the_value_without_an_error():
    assert weighted_mean([Sample(total=1e300), Sample(total=0.0)]) == MetricValue(value=5e299, stderr=None, n=2)


def test_examples_without_supervised_tokens_do_not_count_for_the_loss():
    values = compute(
        find_metrics(["loss"]),
        [ONE, replace(ONE, prompt="another"), replace(ONE, loss_sum=0.0, tokens=0, correct_tokens=0)],
    )
    assert values["eval.loss"] == MetricValue(value=1.0, stderr=0.0, n=2)


def test_token_accuracy_is_a_share_of_tokens():
    values = compute(find_metrics(["token_accuracy"]), [ONE, replace(ONE, tokens=1, correct_tokens=1)])
    assert values["eval.token_accuracy"].value == pytest.approx(3 / 5)


def test_exact_match_ignores_white_space_and_nothing_else():
    observations = observed(" Price  is\n$100 ", "price is $100", "Price is $100.", "Price is $100")
    assert compute(find_metrics(["exact_match"]), observations)["eval.exact_match"].value == 0.5


def test_number_errors_leave_parse_failures_out_and_count_them():
    values = compute(find_metrics(["number"]), observed("$110", "$150", "no idea", "$100"))
    assert values["eval.mean_absolute_error"].value == pytest.approx(20.0)
    assert values["eval.mean_absolute_error"].n == 3
    assert values["eval.mean_relative_error"].value == pytest.approx(0.2)
    assert values["eval.within_20_percent"].value == 0.5
    assert values["eval.within_20_percent"].n == 4
    assert values["eval.parse_failures"].value == 0.25
    assert values["eval.parse_failures"].n == 4


def test_twenty_percent_itself_is_within():
    values = compute(find_metrics(["number"]), observed("$120", "$80", "$121", "$79"))
    assert values["eval.within_20_percent"].value == 0.5


def test_a_model_that_never_gives_a_number_has_no_error_and_only_failures():
    values = compute(find_metrics(["number"]), observed("no", "idea"))
    assert values["eval.mean_absolute_error"] == MetricValue(value=None, stderr=None, n=0)
    assert values["eval.within_20_percent"].value == 0.0
    assert values["eval.parse_failures"].value == 1.0


def test_a_reference_without_a_number_counts_nowhere():
    values = compute(find_metrics(["number"]), observed("$5", reference="unknown"))
    assert {value.n for value in values.values()} == {0}


def test_a_reference_of_zero_has_no_relative_error():
    values = compute(find_metrics(["number"]), observed("$5", "$0", reference="$0"))
    assert values["eval.mean_relative_error"].n == 0
    assert values["eval.mean_absolute_error"].value == 2.5
    assert values["eval.within_20_percent"].value == 0.5


def test_scores_are_an_examples_own_values_and_none_where_it_does_not_count():
    (observation,) = observed("no idea")
    own = scores(find_metrics(["loss", "token_accuracy", "number"]), observation)
    assert own == {
        "eval.loss": 1.0,
        "eval.token_accuracy": 0.5,
        "eval.mean_absolute_error": None,
        "eval.mean_relative_error": None,
        "eval.within_20_percent": 0.0,
        "eval.parse_failures": 1.0,
    }


def test_an_unknown_metric_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match="no metric 'bleu'; available: loss, token_accuracy, exact_match, number"):
        find_metrics(["loss", "bleu"])


def test_a_name_registered_twice_is_refused(registry):
    with pytest.raises(ConfigError, match="metric 'loss' is registered already, by rankwise"):
        metric("loss", keys=["eval.loss"])(lambda observation: {})


def test_a_metric_of_another_package_is_found_by_its_entry_point(registry, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(install_example_metrics(tmp_path))
    values = compute(find_metrics(["answer_length"]), observed("ab1", "2", ""))
    assert values["eval.answer_length"].value == pytest.approx(4 / 3)
    assert (values["eval.digit_share"].value, values["eval.digit_share"].n) == (0.5, 2)
    with pytest.raises(ConfigError, match="available: loss, token_accuracy, exact_match, number, answer_length"):
        find_metrics(["bleu"])
