"""Arms out of a real MLflow store."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from rankwise.cli.compare import compare as command
from rankwise.evaluation.gather import BASE_EVALUATIONS, EVAL_HASH, PRIMARY_METRIC, arm_record, gather, typed_params
from rankwise.evaluation.metrics import MetricValue, to_tracking
from rankwise.exceptions import ConfigError
from rankwise.settings import Settings
from rankwise.tracking.query import SUBMITTED, RunRecord, sweep_tags
from rankwise.tracking.store import Store

LOSS = {"eval.loss": MetricValue(value=0.7, stderr=0.02, n=200)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("store")
    settings = Settings.load({"RANKWISE_HOME": str(home)})
    with Store.open(settings, interval=0.1) as store:
        experiment = store.experiment("diamonds-rank")
        parent = store.start_run(experiment, "sweep", kind="sweep", tags={PRIMARY_METRIC: "eval.within_20_percent"},
                                 system_metrics=False)  # fmt: skip

        def train(spec_hash, r, status, metrics=None, reason=None, **tags):
            run = store.start_run(
                experiment, f"r={r}", parent=parent.run_id, kind="train", spec_hash=spec_hash, system_metrics=False,
                params={"lora.r": r, "lora.alpha": 2 * r, "lora.rslora": False, "training.learning_rate": 2e-3,
                        "seed": 0, "base_model": "org/base"},
                tags=tags,
            )  # fmt: skip
            run.metrics({"adapter.parameters": 57600 * r, "adapter.bytes": 230400 * r, "train.seconds": 12.5,
                         "train.peak_memory_bytes": 123456789, "train.loss": 3.0}, 5)  # fmt: skip
            if metrics:
                run.metrics(to_tracking(metrics), 5)
            run.end(status, reason)
            return run.run_id

        ids = {
            "first": train("a" * 64, 2, "FAILED", reason="out of memory"),
            "again": train("a" * 64, 2, "FINISHED", LOSS, **{"rankwise.model_uri": "models:/pricer/1"}),
            "broken": train("b" * 64, 4, "KILLED", reason="interrupted"),
        }
        base = store.start_run(experiment, "base", parent=parent.run_id, kind="base", system_metrics=False)
        base.metrics(to_tracking({"eval.loss": MetricValue(value=3.1, stderr=0.1, n=200)}), 0)
        base.end("FINISHED")
        parent.end("FINISHED")
        store.experiment("empty")
    return settings, ids


@pytest.fixture
def store(home):
    with Store.open(home[0]) as store:
        yield store


def test_arms_come_with_numbers_model_cost_and_the_run_that_decides(store, home):
    comparison = gather(store, "diamonds-rank")
    first, second = comparison.arms
    assert first.run_id == home[1]["again"]
    assert first.status == "FINISHED"
    assert first.params == {
        "lora.r": 2, "lora.alpha": 4, "lora.rslora": False, "training.learning_rate": 0.002, "seed": 0,
        "base_model": "org/base",
    }  # fmt: skip
    assert first.metrics == LOSS
    assert first.model_uri == "models:/pricer/1"
    assert (first.adapter_parameters, first.adapter_bytes) == (115200, 460800)
    assert (first.seconds, first.peak_memory_bytes) == (12.5, 123456789)
    assert (second.status, second.reason, second.metrics) == ("KILLED", "interrupted", {})
    assert comparison.base["eval.loss"].value == 3.1


def test_the_primary_metric_and_its_direction_come_from_the_sweep(store):
    comparison = gather(store, "diamonds-rank")
    assert comparison.primary_metric == "eval.within_20_percent"
    assert comparison.greater_is_better


def test_the_arms_are_those_of_the_sweep_that_was_submitted_last(store):
    experiment = store.experiment("extended")

    def sweep(*spec_hashes):
        run = store.start_run(
            experiment, "sweep", kind="sweep", tags=sweep_tags(spec_hashes), status="SCHEDULED", system_metrics=False
        )
        run.leave()
        return run.run_id

    def train(parent, spec_hash):
        run = store.start_run(
            experiment, "arm", parent=parent, kind="train", spec_hash=spec_hash * 64, system_metrics=False
        )
        run.end()

    def found(**more):
        return sorted(arm.spec_hash[0] for arm in gather(store, "extended", **more).arms)

    first = sweep("a" * 64, "b" * 64)
    train(first, "a")
    train(first, "b")
    second = sweep("b" * 64, "c" * 64)
    train(second, "c")
    train(second, "d")  # A later round of a search.
    assert found() == ["b", "c", "d"]
    assert found(everything=True) == ["a", "b", "c", "d"]
    again = store.resume_run(first, system_metrics=False, restart=False)
    again.tags(sweep_tags(["a" * 64, "b" * 64]))
    again.leave()
    assert found() == ["a", "b"]


def test_the_base_is_the_one_on_the_rows_of_the_sweep(store):
    experiment = store.experiment("other rows and back")

    def base(evaluation, loss):
        run = store.start_run(experiment, "base", kind="base", tags={EVAL_HASH: evaluation}, system_metrics=False)
        run.metrics(to_tracking({"eval.loss": MetricValue(value=loss, stderr=0.1, n=200)}), 0)
        run.end("FINISHED")

    tags = {**sweep_tags(["a" * 64]), BASE_EVALUATIONS: "0000,1111"}
    sweep = store.start_run(experiment, "sweep", kind="sweep", tags=tags, system_metrics=False)
    arm = store.start_run(
        experiment, "arm", parent=sweep.run_id, kind="train", spec_hash="a" * 64, system_metrics=False
    )
    arm.end()
    sweep.end()
    assert gather(store, "other rows and back").base == {}
    base("1111", 3.0)
    # The definition had other rows for a while. What was evaluated before is not evaluated again.
    base("2222", 4.0)
    assert gather(store, "other rows and back").base["eval.loss"].value == 3.0


def test_a_sweep_that_ends_is_weighed_by_its_own_metric(store):
    experiment = store.experiment("two metrics")

    def sweep(metric, submitted):
        tags = {**sweep_tags(["a" * 64]), PRIMARY_METRIC: metric, SUBMITTED: str(submitted)}
        run = store.start_run(experiment, "sweep", kind="sweep", tags=tags, system_metrics=False)
        run.end()
        return run.run_id

    first, second = sweep("eval.loss", 1), sweep("eval.token_accuracy", 2)
    arm = store.start_run(experiment, "arm", parent=first, kind="train", spec_hash="a" * 64, system_metrics=False)
    arm.end()
    found = gather(store, "two metrics", everything=True, parent_run_id=first)
    assert (found.primary_metric, found.greater_is_better, found.parent_run_id) == ("eval.loss", False, first)
    found = gather(store, "two metrics", everything=True)
    assert (found.primary_metric, found.greater_is_better, found.parent_run_id) == (
        "eval.token_accuracy", True, second
    )  # fmt: skip


def test_a_very_large_sweep_lists_its_arms_in_several_tags():
    hashes = [f"{number:064x}"[::-1] for number in range(1500)]
    tags = sweep_tags(hashes)
    assert sorted(tags) == ["rankwise.arms", "rankwise.arms.1", "rankwise.arms.2", "rankwise.submitted"]
    assert max(map(len, tags.values())) <= 8000
    listed = {short for key, value in tags.items() if "arms" in key for short in value.split(",")}
    assert listed == {spec_hash[:12] for spec_hash in hashes}


def test_an_experiment_that_does_not_exist_or_is_empty_is_told(store):
    with pytest.raises(ConfigError, match="there is no MLflow experiment 'nope' in sqlite:"):
        gather(store, "nope")
    with pytest.raises(ConfigError, match="experiment 'empty' has no arms yet"):
        gather(store, "empty")


def test_the_command_prints_json_and_a_table_on_stdout(home, monkeypatch):
    monkeypatch.setenv("RANKWISE_HOME", str(home[0].home))
    result = CliRunner().invoke(command, ["diamonds-rank", "--json"], catch_exceptions=False)
    printed = json.loads(result.stdout)
    assert printed["experiment"] == "diamonds-rank"
    assert [arm["params"]["lora.r"] for arm in printed["arms"]] == [2, 4]
    assert printed["arms"][1]["status"] == "KILLED"
    table = CliRunner().invoke(command, ["diamonds-rank"], catch_exceptions=False)
    assert "KILLED: interrupted" in table.stdout
    assert "0.700 ±0.020" in table.stdout


def test_texts_of_digits_stay_texts_and_numbers_become_numbers():
    assert typed_params(
        {
            "lora.r": "8",
            "lora.dropout": "0.05",
            "lora.rslora": "True",
            "lora.target_modules": "q_proj,v_proj",
            "training.learning_rate": "2e-05",
            "base_model_revision": "1" * 40,
            "dataset.train": "1e5",
            "training.lr_scheduler_type": "cosine",
            "note": "nan",
        }
    ) == {
        "lora.r": 8,
        "lora.dropout": 0.05,
        "lora.rslora": True,
        "lora.target_modules": "q_proj,v_proj",
        "training.learning_rate": 2e-05,
        "base_model_revision": "1" * 40,
        "dataset.train": "1e5",
        "training.lr_scheduler_type": "cosine",
        "note": "nan",
    }


def test_an_arm_with_metrics_that_are_no_numbers_is_still_shown():
    metrics = {"eval.loss": math.nan, "eval.loss.n": 9.0, "adapter.rank_99": math.nan, "train.seconds": math.inf}
    run = RunRecord(
        run_id="r", experiment_id="1", name="r", status="FAILED", started_ms=0, ended_ms=1, artifact_uri="", params={},
        metrics=metrics, tags={"rankwise.spec_hash": "a" * 64},
    )  # fmt: skip
    arm = arm_record(run)
    assert (arm.rank_99, arm.seconds, arm.metrics["eval.loss"].value) == (None, None, None)
    json.dumps(arm.to_json(), allow_nan=False)
