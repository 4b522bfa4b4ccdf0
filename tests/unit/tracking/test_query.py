from __future__ import annotations

import pytest

from rankwise.exceptions import TrackingError
from rankwise.tracking import query
from rankwise.tracking.query import by_spec_hash, metric_histories, search_runs
from rankwise.tracking.run import PARENT


@pytest.fixture
def store(shared_store):
    return shared_store


def start(store, experiment, name, **more):
    return store.start_run(experiment, name, system_metrics=False, **more)


def test_every_run_is_found_over_several_pages_oldest_first(store, experiment, monkeypatch):
    monkeypatch.setattr(query, "_PAGE", 3)
    for number in range(8):
        store.client.create_run(experiment, start_time=1000 + number, run_name=f"run {number}")
    found = search_runs(store.client, experiment)
    assert [run.name for run in found] == [f"run {number}" for number in range(8)]


def test_runs_are_found_by_kind_parent_and_tag(store, experiment):
    parent = start(store, experiment, "sweep", kind="sweep")
    child = start(store, experiment, "arm", kind="train", parent=parent.run_id, tags={"rankwise.host": "a"})
    other = start(store, experiment, "arm", kind="train", tags={"rankwise.host": "b"})
    for run in (child, other, parent):
        run.end()
    assert [run.run_id for run in search_runs(store.client, experiment, tags={PARENT: parent.run_id})] == [child.run_id]
    assert {run.run_id for run in search_runs(store.client, experiment, kind="train")} == {child.run_id, other.run_id}
    assert [run.run_id for run in search_runs(store.client, experiment, tags={"rankwise.host": "b"})] == [other.run_id]


def test_runs_of_an_arm_are_grouped_by_its_hash(store, experiment):
    for spec_hash in ("a" * 64, "b" * 64, "a" * 64, None):
        start(store, experiment, "arm", spec_hash=spec_hash).end()
    grouped = by_spec_hash(search_runs(store.client, experiment))
    assert {key: len(runs) for key, runs in grouped.items()} == {"a" * 64: 2, "b" * 64: 1}


def test_a_record_has_latest_metrics_params_and_times(store, experiment):
    run = start(store, experiment, "arm", params={"lora.r": 4})
    run.metric("train.loss", 2.0, 0)
    run.metric("train.loss", 1.0, 1)
    run.end()
    (record,) = search_runs(store.client, experiment)
    assert record.metrics == {"train.loss": 1.0}
    assert record.params == {"lora.r": "4"}
    assert record.status == "FINISHED"
    assert record.parent is None
    assert record.seconds == (record.ended_ms - record.started_ms) / 1000


def test_curves_of_several_runs_come_together_by_step(store, experiment):
    runs = [start(store, experiment, f"r={number}") for number in range(3)]
    for number, run in enumerate(runs):
        for step in reversed(range(4)):
            run.metric("train.loss", number + step, step)
        run.end()
    curves = metric_histories(store.client, [run.run_id for run in runs], ["train.loss", "eval.loss"])
    for number, run in enumerate(runs):
        assert [(point.step, point.value) for point in curves[run.run_id]["train.loss"]] == [
            (step, number + step) for step in range(4)
        ]
        assert curves[run.run_id]["eval.loss"] == []


def test_a_run_that_does_not_exist_is_an_error(store):
    with pytest.raises(TrackingError, match="reading run nothing"):
        query.get_run(store.client, "nothing")


def test_a_quote_in_a_tag_is_refused(store, experiment):
    with pytest.raises(ValueError, match="must not contain a quote"):
        search_runs(store.client, experiment, kind="it's")
