from __future__ import annotations

import pytest
from helpers.local_store import prepared_home

from rankwise.exceptions import TrackingError
from rankwise.tracking.query import get_run, read_json
from rankwise.tracking.store import Store


@pytest.fixture
def store(tmp_path):
    with Store.open(prepared_home(tmp_path / "home"), interval=0.1) as store:
        yield store


def run_with(store, name, **texts):
    run = store.start_run(store.experiment("x"), name, system_metrics=False)
    for path, text in texts.items():
        run.text(text, f"{path}.json")
    run.end()
    return run.run_id


def test_what_runs_have_is_read_and_those_without_it_are_left_out(store):
    first, second = run_with(store, "a", table="[1, 2]"), run_with(store, "b")
    places = {run_id: get_run(store.client, run_id).artifact_uri for run_id in (first, second)}
    assert read_json(store.client, places, "table.json") == {first: [1, 2]}
    assert read_json(store.client, {first: ""}, "table.json") == {first: [1, 2]}
    assert read_json(store.client, {}, "table.json") == {}


def test_a_store_elsewhere_is_asked_whether_a_file_is_there(store, monkeypatch):
    first, second = run_with(store, "a", table="[1]"), run_with(store, "b")
    places = dict.fromkeys((first, second), "mlflow-artifacts:/nowhere")

    def download(artifact_uri, dst_path):
        raise OSError("no server")

    monkeypatch.setattr("rankwise.tracking.query.download_artifacts", download)
    assert read_json(store.client, {second: places[second]}, "table.json") == {}
    with pytest.raises(TrackingError, match=rf"table.json of run {first} cannot be read: no server"):
        read_json(store.client, places, "table.json")


def test_a_file_that_is_no_json_is_named(store):
    broken = run_with(store, "a", table="{")
    with pytest.raises(TrackingError, match=rf"the artifact table.json of run {broken} is not JSON"):
        read_json(store.client, {broken: ""}, "table.json")
