from __future__ import annotations

from typing import get_args

from rankwise.experiment.metric_names import GENERATED, GREATER_IS_BETTER, METRIC_KEYS, greater_is_better, keys_of
from rankwise.experiment.schema import Metric


def test_the_schema_admits_exactly_the_metrics_of_the_table():
    assert set(get_args(Metric)) == set(METRIC_KEYS)
    assert set(METRIC_KEYS) >= GENERATED


def test_every_key_belongs_to_one_metric():
    keys = keys_of(METRIC_KEYS)
    assert len(keys) == len(set(keys))
    assert set(keys) >= GREATER_IS_BETTER


def test_keys_come_in_the_order_of_the_metrics_and_unknown_ones_have_none():
    assert keys_of(["token_accuracy", "nothing", "loss"]) == ("eval.token_accuracy", "eval.loss", "eval.perplexity")


def test_losses_and_errors_are_better_when_smaller():
    assert greater_is_better("eval.exact_match")
    assert not greater_is_better("eval.loss")
    assert not greater_is_better("eval.parse_failures")
