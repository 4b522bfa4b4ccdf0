from __future__ import annotations

import csv
import io
import json

from helpers.comparisons import arm, ranks, seeds_and_rates

from rankwise.evaluation.compare import compare
from rankwise.evaluation.findings import find
from rankwise.report.comparison_output import comparison_csv, comparison_json


def exported(comparison):
    return comparison_json(comparison, find(comparison, lambda arms: {}))


def test_what_was_promised_stays_and_the_rest_is_added():
    comparison = ranks()
    data = exported(comparison)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert {key: data[key] for key in comparison.to_json()} == comparison.to_json()
    assert data["answer"]["status"] == "no_statement"
    assert set(data) - set(comparison.to_json()) == {"answer", "configurations", "importance"}


def test_configurations_have_their_mean_over_seeds_and_their_place():
    data = exported(seeds_and_rates())
    assert len(data["configurations"]) == 8
    assert sorted(each["place"] for each in data["configurations"]) == list(range(1, 9))
    best = next(each for each in data["configurations"] if each["place"] == 1)
    assert best["params"] == {"lora.r": 16, "lora.alpha": 32, "training.learning_rate": 0.002}
    assert best["seeds"] == 3
    assert best["on_front"]
    assert {each["name"] for each in data["importance"]["settings"]} == {"r", "learning rate"}


def test_without_a_result_there_is_no_rank():
    failed = compare("x", [arm(2, None, status="FAILED")], primary_metric="eval.loss", greater_is_better=False)
    data = exported(failed)
    assert data["answer"]["text"] == "No statement about ranks: no arm has finished."
    assert data["importance"] is None
    assert data["configurations"][0]["place"] is None


def test_the_csv_has_a_line_for_each_arm_and_a_column_for_everything():
    lines = list(csv.DictReader(io.StringIO(comparison_csv(ranks()))))
    assert [line["lora.r"] for line in lines] == ["2", "4", "8", "16"]
    assert lines[2]["eval.loss"] == "0.71"
    assert lines[2]["eval.loss.stderr"] == "0.02"
    assert lines[2]["eval.loss.n"] == "200"
    assert lines[2]["place"] == "1"
    assert lines[2]["model_uri"] == "models:/pricer/8"
    assert lines[3]["status"] == "FAILED"
    assert lines[3]["reason"] == "CUDA out of memory"
    assert lines[3]["eval.loss"] == ""
    assert lines[3]["place"] == ""
