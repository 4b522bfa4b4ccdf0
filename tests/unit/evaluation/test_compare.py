from __future__ import annotations

import json
from dataclasses import replace

from helpers.comparisons import BASE, arm, ranks, seeds_and_rates, values

from rankwise.evaluation.compare import compare
from rankwise.evaluation.findings import find
from rankwise.evaluation.metrics import MetricValue


def test_the_dictionary_is_what_the_json_interface_promises():
    comparison = ranks().to_json()
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison
    assert list(comparison) == [
        "experiment",
        "primary_metric",
        "base",
        "arms",
        "best",
        "experiment_id",
        "parent_run_id",
    ]
    assert comparison["experiment"] == "diamonds-rank"
    assert comparison["primary_metric"] == {"name": "eval.loss", "greater_is_better": False}
    assert comparison["base"]["metrics"]["eval.loss"] == {"value": 3.1, "stderr": 0.05, "n": 200}
    first = comparison["arms"][0]
    assert list(first) == [
        "spec_hash", "run_id", "status", "reason", "params", "model_uri", "adapter", "metrics", "seconds",
        "peak_memory_bytes", "pruned", "effective_rank", "rank_99",
    ]  # fmt: skip
    assert first["run_id"] == ranks().arms[0].run_id != ""
    assert first["params"] == {"lora.r": 2, "lora.alpha": 4, "seed": 0}
    assert first["adapter"] == {"parameters": 115200, "bytes": 460800}
    assert first["metrics"]["eval.loss"] == {"value": 0.93, "stderr": 0.02, "n": 200}
    assert comparison["best"] == comparison["arms"][2]["spec_hash"]


def test_arms_are_sorted_by_rank_as_numbers_and_a_failed_one_keeps_its_reason():
    comparison = ranks()
    assert [each.params["lora.r"] for each in comparison.arms] == [2, 4, 8, 16]
    assert comparison.to_json()["arms"][3]["status"] == "FAILED"
    assert comparison.to_json()["arms"][3]["reason"] == "CUDA out of memory"
    assert comparison.to_json()["arms"][3]["metrics"] == {}


def test_a_greater_metric_is_ranked_the_other_way():
    comparison = ranks(primary_metric="eval.token_accuracy", greater_is_better=True)
    assert [each.params["lora.r"] for each in comparison.ranking] == [8, 4, 2]
    reversed_ = ranks(greater_is_better=True)
    assert [each.params["lora.r"] for each in reversed_.ranking] == [2, 4, 8]


def test_configurations_are_ranked_by_the_mean_over_seeds_and_the_best_arm_is_of_the_best_of_them():
    # One lucky seed of r = 2 has the lowest loss of all; r = 4 is better on the average.
    arms = [
        arm(2, 0.5, seed=0), arm(2, 1.5, seed=1),
        arm(4, 0.9, seed=0), arm(4, 0.7, seed=1),
    ]  # fmt: skip
    comparison = compare("x", arms, primary_metric="eval.loss", greater_is_better=False)
    assert [each.params["lora.r"] for each in comparison.ranking] == [4, 2]
    assert comparison.best is arms[3]
    summary = comparison.ranking[1].metric("eval.loss")
    assert summary is not None
    assert (summary.value, summary.seeds) == (1.0, 2)
    assert summary.spread is not None
    assert abs(summary.spread - 0.5**0.5) < 1e-12


def test_a_seed_that_failed_is_left_out_of_the_mean_and_an_arm_that_runs_is_not_ranked():
    arms = [arm(2, 0.5, seed=0), arm(2, None, seed=1, status="FAILED"), arm(4, 0.1, status="RUNNING")]
    comparison = compare("x", arms, primary_metric="eval.loss", greater_is_better=False)
    assert [each.params["lora.r"] for each in comparison.ranking] == [2]
    assert len(comparison.configurations[0].arms) == 2
    assert len(comparison.configurations[0].finished) == 1


def test_equal_means_go_to_the_smaller_adapter():
    comparison = compare("x", [arm(8, 0.5), arm(4, 0.5)], primary_metric="eval.loss", greater_is_better=False)
    assert comparison.best is not None
    assert comparison.best.params["lora.r"] == 4


def test_an_arm_whose_metric_is_not_defined_is_never_the_best():
    diverged = replace(arm(8, 0.5), metrics=values(loss=(None, None)))
    comparison = compare("x", [diverged, arm(4, 9.0)], primary_metric="eval.loss", greater_is_better=False)
    assert comparison.best is not None
    assert comparison.best.params["lora.r"] == 4
    alone = compare("x", [diverged], primary_metric="eval.loss", greater_is_better=False)
    assert alone.best is None
    assert alone.to_json()["best"] is None


def test_axes_are_the_settings_that_differ():
    assert ranks().axes == ()
    assert seeds_and_rates().axes == ("training.learning_rate",)


def test_without_a_base_its_metrics_are_empty():
    assert ranks(base=None).to_json()["base"] == {"metrics": {}}
    assert ranks().base == BASE


def test_a_thousand_arms_are_compared_in_well_under_a_second():
    import time

    arms = [arm(r, 1.0 / r, seed=seed, training__learning_rate=rate / 1e4)
            for r in range(1, 11) for seed in range(10) for rate in range(1, 11)]  # fmt: skip
    begun = time.perf_counter()
    comparison = compare("x", arms, primary_metric="eval.loss", greater_is_better=False)
    assert len(comparison.ranking) == 100
    assert comparison.to_json()["best"] is not None
    assert time.perf_counter() - begun < 2.0


def answering(r, error, answered, examples=90):
    """An arm that gives a number for some of its examples."""
    counts = {"eval.mean_absolute_error": (error, answered), "eval.parse_failures": (1 - answered / examples, examples)}
    metrics = {key: MetricValue(value=value, stderr=0.1, n=n) for key, (value, n) in counts.items()}
    return replace(arm(r, None), metrics=metrics)


def test_an_arm_that_hardly_answers_is_not_the_best_by_what_it_says():
    arms = [answering(2, 0.0, 3), answering(4, 50.0, 90), answering(8, 60.0, 80)]
    comparison = compare("x", arms, primary_metric="eval.mean_absolute_error", greater_is_better=False)
    assert [each.params["lora.r"] for each in comparison.silent] == [2]
    assert comparison.best.params["lora.r"] == 4
    assert [each.params["lora.r"] for each in comparison.ranking] == [4, 8]
    assert [each.params["lora.r"] for each in find(comparison, lambda _: {}).by_rank] == [4, 8]
    # What all are silent on says nothing, and neither does a larger evaluation.
    same = [answering(2, 40.0, 9), answering(4, 50.0, 10), answering(8, 60.0, 90, 900)]
    assert compare("x", same, primary_metric="eval.mean_absolute_error", greater_is_better=False).silent == ()
