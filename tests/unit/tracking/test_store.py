from __future__ import annotations

import os
import time

import pytest
from helpers.arms import small_experiment
from helpers.local_store import local_settings

from rankwise.exceptions import StorageError, TrackingError
from rankwise.settings import Settings
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.query import get_run
from rankwise.tracking.store import Store


def points(store, run_id, key="train.loss"):
    return [(metric.step, metric.value) for metric in store.client.get_metric_history(run_id, key)]


def abandon(run):
    """Let go of a run as the death of its process would: nothing is delivered, the lock is dropped."""
    sender, outbox = run._sender, run._outbox
    with sender._changed:
        sender._changed.wait_for(lambda: sender._busy is not outbox)
        sender._posts.pop(outbox)
    os.close(outbox._descriptor)


def test_an_experiment_is_made_once_with_its_description_and_kind(store):
    spec = small_experiment()
    first = store.experiment(spec.name, spec)
    assert store.experiment(spec.name, spec) == first
    assert store.find_experiment(spec.name) == first
    tags = store.client.get_experiment(first).tags
    assert tags["mlflow.note.content"] == "Which rank?"
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_description_of_an_experiment_follows_the_file(store):
    store.experiment("diamonds", small_experiment())
    found = store.experiment("diamonds", small_experiment(description="Which alpha?"))
    assert store.client.get_experiment(found).tags["mlflow.note.content"] == "Which alpha?"


def test_artifacts_of_a_local_store_lie_in_the_home(store, settings):
    found = store.client.get_experiment(store.experiment("diamonds"))
    assert found.artifact_location == (settings.artifacts / "diamonds").as_uri()


def test_names_that_are_no_folder_names_get_folders_of_their_own(store, settings):
    places = {store.client.get_experiment(store.experiment(name)).artifact_location for name in ("a b", "a_b", ".a_b")}
    assert len(places) == 3
    assert all(place.rpartition("/")[0] == settings.artifacts.as_uri() for place in places)


def test_a_deleted_experiment_is_an_error_that_says_how_to_restore_it(store):
    found = store.experiment("diamonds")
    store.client.delete_experiment(found)
    with pytest.raises(TrackingError, match=rf"is deleted: restore it with `mlflow experiments restore .* {found}`"):
        store.experiment("diamonds")
    assert store.find_experiment("diamonds") is None


def test_there_is_no_experiment_before_it_is_made(store):
    assert store.find_experiment("nothing") is None


def test_a_child_knows_its_parent_kind_and_arm(store, experiment):
    parent = store.start_run(experiment, "sweep", kind="sweep", system_metrics=False)
    child = store.start_run(
        experiment, "r=4", parent=parent.run_id, kind="train", spec_hash="ab" * 32, system_metrics=False
    )
    child.end()
    parent.end()
    (record,) = store.runs(experiment, parent=parent.run_id)
    assert (record.run_id, record.kind, record.spec_hash) == (child.run_id, "train", "ab" * 32)
    assert [run.run_id for run in store.runs(experiment, kind="sweep")] == [parent.run_id]


def test_system_metrics_go_to_every_open_run_and_not_to_others(store, experiment):
    with_them = [store.start_run(experiment, "a"), store.start_run(experiment, "b")]
    without = store.start_run(experiment, "c", system_metrics=False)
    deadline = time.monotonic() + 10
    wanted = "system/cpu_utilization_percentage"
    for run in with_them:
        while wanted not in get_run(store.client, run.run_id).metrics and time.monotonic() < deadline:
            store._monitor._interval = 0.1
            time.sleep(0.05)
            if run is with_them[1]:
                break
    for run in (*with_them, without):
        run.end()
    assert wanted in get_run(store.client, with_them[0].run_id).metrics
    assert wanted not in get_run(store.client, without.run_id).metrics


def test_a_resumed_run_gets_what_was_left_and_no_point_twice(store, experiment):
    run = store.start_run(experiment, "r=4", system_metrics=False)
    for step in range(6):
        run.metric("train.loss", 10 - step, step)
    run.flush()
    store._sender._interval = 60
    for step in range(6, 8):
        run.metric("train.loss", 10 - step, step)
    run.text("left", "left.txt")
    with store._lock:
        store._runs.clear()
    abandon(run)
    resumed = store.resume_run(run.run_id, system_metrics=False)
    assert get_run(store.client, run.run_id).metrics == {"train.loss": 3.0}
    for step in range(4, 10):  # From the checkpoint at step 4: 4 to 7 are done again.
        resumed.metrics({"train.loss": 10 - step + 1e-7}, step)
    resumed.end()
    assert [step for step, _ in points(store, run.run_id)] == list(range(10))
    assert [info.path for info in store.client.list_artifacts(run.run_id)] == ["left.txt"]
    assert get_run(store.client, run.run_id).status == "FINISHED"


def test_a_run_that_was_killed_is_running_again_when_resumed(store, experiment):
    run = store.start_run(experiment, "r=4", system_metrics=False)
    run.end("KILLED", "interrupted")
    resumed = store.resume_run(run.run_id, system_metrics=False)
    resumed.flush()
    assert get_run(store.client, run.run_id).status == "RUNNING"
    resumed.end()
    assert get_run(store.client, run.run_id).status == "FINISHED"


def test_an_open_run_is_not_opened_twice(store, experiment):
    run = store.start_run(experiment, "r=4", system_metrics=False)
    with pytest.raises(TrackingError, match="is open in this process already"):
        store.resume_run(run.run_id)
    run.end()


def test_resuming_a_run_that_does_not_exist_is_an_error(store):
    with pytest.raises(TrackingError, match="reading run nosuchrun"):
        store.resume_run("nosuchrun")


def test_sync_delivers_what_a_dead_process_left_and_leaves_living_ones_alone(store, experiment, settings):
    dead = store.start_run(experiment, "dead", system_metrics=False)
    store._sender._interval = 60
    dead.metric("train.loss", 1.0, 0)
    dead._append({"end": "FINISHED", "t": 1})
    abandon(dead)
    living = store.start_run(experiment, "living", system_metrics=False)
    report = store.sync(10)
    assert report.delivered == (dead.run_id,)
    assert report.waiting == report.problems == ()
    assert get_run(store.client, dead.run_id).status == "FINISHED"
    assert points(store, dead.run_id) == [(0, 1.0)]
    living.end()
    assert list(settings.outbox.iterdir()) == []


def test_sync_does_not_send_to_another_store_than_the_one_it_was_meant_for(store, settings):
    outbox = Outbox.create(settings.outbox, "r1", "http://elsewhere.example")
    outbox.append({"tags": {"a": "b"}})
    outbox.close()
    report = store.sync(5)
    assert report.delivered == report.waiting == ()
    assert "is for the store http://elsewhere.example" in report.problems[0]
    assert outbox.path.exists()


def test_a_point_that_was_sent_before_a_crash_is_not_doubled_when_sent_again(store, experiment):
    run = store.start_run(experiment, "r=4", system_metrics=False)
    for step in range(50):
        run.metrics({"train.loss": step, "train.nan": float("nan")}, step)
    run.flush()
    run._outbox.path.with_suffix(".offset").unlink()
    with store._lock:
        store._runs.clear()
    abandon(run)
    assert store.sync(10).delivered == (run.run_id,)
    assert len(points(store, run.run_id)) == 50
    assert len(points(store, run.run_id, "train.nan")) == 50


def test_nothing_is_written_to_stdout(store, experiment, capsys):
    with store.start_run(experiment, "r=4", system_metrics=False) as run:
        run.text("x", "a.txt")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_server_that_is_not_there_is_an_error_within_seconds(tmp_path):
    settings = Settings.load({"RANKWISE_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "http://ann:pw@127.0.0.1:9"})
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"the MLflow server http://\[redacted\]@127.0.0.1:9 does not answer"):
        Store.open(settings)
    assert time.monotonic() - began < 5


def test_a_home_that_cannot_be_made_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, NotADirectoryError), match="file"):
        Store.open(local_settings(tmp_path / "file" / "home"))
