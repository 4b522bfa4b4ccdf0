from __future__ import annotations

import os
import time

import pytest
from helpers.arms import small_experiment
from helpers.local_store import local_settings

from rankwise.exceptions import StorageError, TrackingError
from rankwise.settings import Settings
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.query import get_run, search_runs
from rankwise.tracking.registry import JOB
from rankwise.tracking.run import PARENT
from rankwise.tracking.store import Store
from rankwise.tracking.values import DatasetRecord


def points(store, run_id, key="train.loss"):
    return [(metric.step, metric.value) for metric in store.client.get_metric_history(run_id, key)]


def abandon(run):
    """Let go of a run as the death of its process would: nothing is delivered, the lock is dropped."""
    sender, outbox = run._sender, run._outbox
    with sender._changed:
        sender._changed.wait_for(lambda: sender._busy is not outbox)
        sender._deliveries.pop(outbox)
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
    (record,) = search_runs(store.client, experiment, tags={PARENT: parent.run_id})
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
    assert resumed.drain(10)
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


def test_the_run_of_a_job_is_found_while_nobody_has_ended_it(store, experiment):
    other = store.start_run(experiment, "other", kind="train", tags={JOB: 70}, system_metrics=False)
    run = store.start_run(experiment, "killed", kind="train", tags={JOB: 7}, system_metrics=False)
    assert store.find_running(experiment, 7, "train") == run.run_id
    assert store.find_running(experiment, 7, "evaluate") is None
    for each in (run, other):
        each.end()
    assert store.find_running(experiment, 7, "train") is None


def test_an_open_run_is_not_opened_twice(store, experiment):
    run = store.start_run(experiment, "r=4", system_metrics=False)
    with pytest.raises(TrackingError, match="is already open in this process"):
        store.resume_run(run.run_id)
    run.end()


def test_a_run_that_does_not_exist_is_found_out_by_the_delivery(store):
    resumed = store.resume_run("nosuchrun", system_metrics=False)
    resumed.metric("train.loss", 1.0, 0)
    assert resumed.end()
    assert "nosuchrun" in resumed.refusals[0]
    assert '"train.loss"' in resumed._outbox.refused.read_text()


def test_scheduled_runs_are_found_by_their_jobs(store, experiment):
    def schedule(job, **more):
        run = store.start_run(experiment, "r=4", tags={"rankwise.job": job}, status="SCHEDULED", **more)
        assert run.leave()
        return run.run_id

    first, second = schedule(7), schedule(8, kind="train")
    begun = store.resume_run(second, system_metrics=False)
    assert store.find_scheduled(experiment) | {8: second} == {7: first, 8: second}
    begun.flush()
    assert store.find_scheduled(experiment) == {7: first}
    begun.end()


def test_a_run_can_be_written_to_without_touching_its_state(store, experiment):
    run = store.start_run(experiment, "r=4", system_metrics=False)
    run.end("KILLED", "interrupted")
    again = store.resume_run(run.run_id, system_metrics=False, restart=False)
    again.metric("eval.loss", 1.0, 3)
    again.leave()
    record = get_run(store.client, run.run_id)
    assert (record.status, record.metrics) == ("KILLED", {"eval.loss": 1.0})


def leave_behind(store, run, steps):
    """Points that are in the outbox when the writer dies."""
    run.flush()
    store._sender._interval = 60
    for step in steps:
        run.metric("train.loss", 10 - step, step)
    with store._lock:
        store._runs.pop(run.run_id)
    abandon(run)
    store._sender._interval = 0.1


@pytest.mark.parametrize("scheduled", [True, False])
def test_what_an_earlier_attempt_left_changes_nothing_that_a_later_one_said(store, experiment, settings, scheduled):
    if scheduled:
        run = store.start_run(experiment, "r=4", status="SCHEDULED")
        run.leave()
        first = store.resume_run(run.run_id, system_metrics=False, attempt=1)
    else:
        run = first = store.start_run(experiment, "r=4", system_metrics=False, attempt=1)
    first.tags({"rankwise.host": "a"})
    for step in range(3):
        first.metric("train.loss", 10 - step, step)
    leave_behind(store, first, range(3, 6))
    hidden = settings.home / "elsewhere"  # The first attempt's machine is not this one.
    hidden.mkdir()
    for path in list(settings.outbox.iterdir()):
        path.rename(hidden / path.name)
    second = store.resume_run(run.run_id, system_metrics=False, attempt=2)
    second.tags({"rankwise.host": "b"})
    for step in range(4, 8):  # From the checkpoint at step 4.
        second.metric("train.loss", 10 - step, step)
    second.text("second", "a.txt")
    second.flush()
    for path in list(hidden.iterdir()):
        path.rename(settings.outbox / path.name)
    assert store.sync(10).waiting == {run.run_id: "a later attempt is writing to this run"}
    second.end()
    assert store.sync(10).delivered == (run.run_id,)
    record = get_run(store.client, run.run_id)
    assert [step for step, _ in sorted(points(store, run.run_id))] == list(range(8))
    assert (record.status, record.tags["rankwise.attempt"], record.tags["rankwise.host"]) == ("FINISHED", "2", "b")
    assert list(settings.outbox.iterdir()) == []


def test_an_attempt_that_made_the_run_may_write_to_it_only_while_it_holds_the_job(store, experiment, settings):
    holds = [True]
    run = store.start_run(experiment, "r=4", system_metrics=False, attempt=1, fence=lambda: holds[0])
    run.metric("train.loss", 3.0, 0)
    run.flush()
    holds[0] = False
    run.metric("train.loss", 2.0, 1)
    assert not run.end("KILLED", timeout=10)
    assert points(store, run.run_id) == [(0, 3.0)]
    assert get_run(store.client, run.run_id).status == "RUNNING"


def test_sync_delivers_what_a_dead_process_left_and_leaves_living_ones_alone(store, experiment, settings):
    dead = store.start_run(experiment, "dead", system_metrics=False)
    store._sender._interval = 60
    dead.metric("train.loss", 1.0, 0)
    dead._append({"end": "FINISHED", "t": 1})
    abandon(dead)
    living = store.start_run(experiment, "living", system_metrics=False)
    report = store.sync(10)
    assert report.delivered == (dead.run_id,)
    assert report.waiting == {}
    assert report.problems == ()
    assert get_run(store.client, dead.run_id).status == "FINISHED"
    assert points(store, dead.run_id) == [(0, 1.0)]
    living.end()
    assert list(settings.outbox.iterdir()) == []


def test_sync_does_not_send_to_another_store_than_the_one_it_was_meant_for(store, settings):
    outbox = Outbox.create(settings.outbox, "r1", "http://elsewhere.example")
    outbox.append({"tags": {"a": "b"}})
    outbox.close()
    report = store.sync(5)
    assert report.delivered == ()
    assert report.waiting == {}
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


def test_a_run_goes_on_without_the_server_and_asking_it_something_is_an_error_within_seconds(tmp_path):
    settings = Settings.load({"RANKWISE_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "http://ann:pw@127.0.0.1:9"})
    began = time.monotonic()
    with Store.open(settings, interval=0.05) as store:
        run = store.resume_run("r1", system_metrics=False, attempt=1)
        run.metrics({"train.loss": 1.0}, 0)
        run.params({"lora.r": 4})
        run.json({}, "a.json")
        run.input(DatasetRecord(name="d", digest="sha256:aa", source="x", source_type="local", context="train"))
        assert not run.drain(0.3)
        assert not run.end(timeout=0.1)
        with pytest.raises(TrackingError, match=r"the MLflow server http://\[redacted\]@127.0.0.1:9 does not answer"):
            store.find_experiment("diamonds")
        report = store.sync(1)
        assert list(report.waiting) == ["r1"]
        assert "refused" in report.waiting["r1"]
    assert time.monotonic() - began < 6
    (path,) = settings.outbox.glob("r1.*.jsonl")
    left = Outbox.adopt(path)
    assert [next(iter(entry.record)) for entry in left.read()] == [
        "status",
        "tags",
        "m",
        "params",
        "file",
        "input",
        "end",
    ]
    assert (left.attempt, left.once) == (1, True)
    left.close()


def test_a_home_that_cannot_be_made_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, NotADirectoryError), match="file"):
        Store.open(local_settings(tmp_path / "file" / "home"))
