from __future__ import annotations

import json
import os

import mlflow
import pytest
from helpers.fake_child import Listener
from helpers.local_store import prepared_home

from rankwise.jobs.job import JobKind, NewJob, Outcome, Worker
from rankwise.settings import Settings
from rankwise.tasks.context import Context
from rankwise.tasks.missing_results import describe_missing
from rankwise.tasks.sync import synchronize
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.query import get_run
from rankwise.tracking.registry import JOB
from rankwise.tracking.store import Store

WORKER = Worker(name="w", host="here", pid=os.getpid())


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return prepared_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def store(settings):
    with Store.open(settings, interval=0.05) as opened:
        yield opened


@pytest.fixture(scope="module")
def experiment(store):
    return store.experiment("diamonds")


@pytest.fixture
def sync(store, queue, settings):
    context = Context(settings=settings, store=store, queue=queue, reporter=Listener())
    return lambda: synchronize(context, timeout=20)


def submit(store, queue, experiment, name="a", kind=JobKind.TRAIN):
    """A claimed job with a run."""
    spec = {"experiment_id": experiment, "bare": False}
    (job,) = queue.submit([NewJob(kind=kind, experiment="e", spec_hash=name, spec=spec)])
    run = store.start_run(experiment, name, tags={JOB: job.id}, status="SCHEDULED")
    run.leave()
    assert queue.assign_run(job.id, run.run_id)
    (claimed,) = queue.claim(WORKER, lease=60)
    return claimed, run.run_id


def register(store, job, run_id, name="pricer"):
    experiment = get_run(store.client, run_id).experiment_id
    model = store.client.create_logged_model(experiment, "adapter", run_id, tags={JOB: str(job.id)})
    store.client.finalize_logged_model(model.model_id, "READY")
    store.registry.ensure_model(name)
    return store.client.create_model_version(
        name, f"models:/{model.model_id}", run_id, tags={JOB: str(job.id)}, model_id=model.model_id
    ).version


def succeed(queue, job, version, name="pricer"):
    queue.finish(job.token, Outcome.SUCCEEDED, result={"model_uri": f"models:/{name}/{version}"})


def versions(store, name="pricer"):
    return {version.version for version in store.registry.versions(name)}


def test_a_second_version_of_a_succeeded_job_is_removed_and_its_result_stays(store, queue, experiment, sync):
    job, run_id = submit(store, queue, experiment)
    first, second, third = (register(store, job, run_id) for _ in range(3))
    succeed(queue, job, second)
    assert sync().removed == (f"models:/pricer/{first}", f"models:/pricer/{third}")
    assert {first, third}.isdisjoint(versions(store))
    assert second in versions(store)
    assert sync().complete


def test_versions_of_other_queues_of_unfinished_jobs_and_of_people_are_not_touched(store, queue, experiment, sync):
    job, run_id = submit(store, queue, experiment)
    elsewhere = store.start_run(experiment, "elsewhere", system_metrics=False)
    elsewhere.end()
    own = register(store, job, run_id)
    # Another queue has a job of that number too, with a run of its own.
    others = [register(store, job, elsewhere.run_id) for _ in range(2)]
    succeed(queue, job, own)
    running, running_run = submit(store, queue, experiment, "b")
    unfinished = [register(store, running, running_run) for _ in range(2)]
    plain = store.client.create_model_version("pricer", "file:/somewhere", elsewhere.run_id).version
    assert sync().removed == ()
    assert {own, *others, *unfinished, plain} <= versions(store)


def test_a_duplicate_that_an_alias_points_to_is_kept_and_told_of(store, queue, experiment, sync):
    job, run_id = submit(store, queue, experiment)
    first, second = (register(store, job, run_id, "aliased") for _ in range(2))
    succeed(queue, job, second, "aliased")
    store.registry.set_alias("aliased", "champion", int(first))
    synced = sync()
    assert not synced.complete
    (reason,) = synced.kept.values()
    assert "the alias champion points here: move the alias" in reason
    assert versions(store, "aliased") == {first, second}
    store.registry.set_alias("aliased", "champion", int(second))
    assert sync().removed == (f"models:/aliased/{first}",)


def test_runs_of_jobs_that_have_ended_get_their_state(store, queue, experiment, sync):
    cancelled, cancelled_run = submit(store, queue, experiment, "a")
    failed, failed_run = submit(store, queue, experiment, "b")
    done, done_run = submit(store, queue, experiment, "c")
    _, running_run = submit(store, queue, experiment, "d")
    queue.finish(cancelled.token, Outcome.CANCELLED)
    queue.finish(failed.token, Outcome.FATAL, error="the loss of step 3 is not finite")
    succeed(queue, done, 1)
    assert dict(sync().ended) == {cancelled_run: "KILLED", failed_run: "FAILED", done_run: "FINISHED"}
    assert get_run(store.client, failed_run).reason == "the loss of step 3 is not finite"
    assert get_run(store.client, running_run).status == "SCHEDULED"
    assert sync().ended == {}


def test_the_run_of_a_prediction_that_was_given_up_gets_its_state_too(store, queue, sync):
    queue.submit([NewJob(kind=JobKind.PREDICT, experiment="predict out.jsonl", spec_hash="p", spec={})])
    run = store.start_run(store.experiment("predictions"), "out.jsonl", kind="predict", system_metrics=False)
    run.leave()
    (claimed,) = queue.claim(WORKER, lease=60)
    queue.set_run(claimed.token, run.run_id)
    queue.finish(claimed.token, Outcome.FATAL, error="the input has changed")
    assert dict(sync().ended) == {run.run_id: "FAILED"}
    assert get_run(store.client, run.run_id).reason == "the input has changed"


def test_what_waits_and_what_was_refused_is_told(store, queue, settings, sync):
    outbox = Outbox.create(settings.outbox, "nosuchrun", settings.tracking_uri)
    outbox.append({"tags": {"a": "b"}})
    outbox.close()
    synced = sync()
    assert not synced.complete
    assert synced.outbox.delivered == ("nosuchrun",)
    assert "nosuchrun" in synced.outbox.problems[0]
    (refused,) = synced.refused
    assert "has 1 records that were refused permanently (Run with id=nosuchrun not found)" in refused
    assert "inspect it, then remove it with nosuchrun." in refused
    assert synced.to_json()["refused"] == [refused]
    outbox.refused.unlink()
    assert sync().complete


def test_a_server_that_is_away_does_not_hide_what_waits(queue, tmp_path):
    settings = Settings.load({"RANKWISE_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    outbox = Outbox.create(settings.outbox, "r1", settings.tracking_uri)
    outbox.append({"tags": {"a": "b"}})
    outbox.close()
    with Store.open(settings) as store:
        context = Context(settings=settings, store=store, queue=queue, reporter=Listener())
        synced = synchronize(context, timeout=1)
    assert list(synced.outbox.waiting) == ["r1"]
    assert "does not answer" in synced.error


def test_the_command_says_what_was_delivered_and_that_something_needs_a_look(tmp_path, monkeypatch, capsys):
    from rankwise.cli.maintenance import sync as command

    settings = prepared_home(tmp_path / "home")
    monkeypatch.setenv("RANKWISE_HOME", str(settings.home))
    with Store.open(settings, interval=0.05) as store:
        run = store.start_run(store.experiment("left"), "r=4", system_metrics=False)
        run.leave()
        outbox = Outbox.create(settings.outbox, run.run_id, settings.tracking_uri)
        outbox.append({"m": {"train.loss": 1.0}, "s": 3, "t": 5})
        outbox.close()
    assert command.main([], standalone_mode=False) == 0
    printed = capsys.readouterr()
    assert printed.out == f"delivered: run {run.run_id}\n"
    assert printed.err == "MLflow is up to date\n"
    (settings.outbox / "r1.aaaaaaaa.refused").write_text('{"tags":{}}\n')
    assert command.main(["--json"], standalone_mode=False) == 1
    assert json.loads(capsys.readouterr().out)["refused"]


def lose(store, *, run_id=None, version=None, model=None):
    if run_id is not None:
        store.client.delete_run(run_id)
    if version is not None:
        store.client.delete_model_version("lost", version)
    if model is not None:
        store.client.delete_logged_model(model)


def finished_job(store, queue, experiment, name):
    """A succeeded job with a run, a model and a version; and the arguments of `lose` for each."""
    # Other tests open other stores.
    mlflow.set_tracking_uri(store.settings.tracking_uri)
    job, run_id = submit(store, queue, experiment, name)
    version = register(store, job, run_id, "lost")
    model = store.registry.get("lost", int(version)).model_id
    result = {"model_uri": f"models:/lost/{version}", "model_id": model, "run_id": run_id}
    queue.finish(job.token, Outcome.SUCCEEDED, result=result)
    return job, {"run_id": run_id, "version": version, "model": model}


@pytest.mark.parametrize(
    ("lost", "parts"),
    [
        (["run_id"], ["run"]),
        (["version"], ["version"]),
        (["model"], ["model"]),
        (["run_id", "version", "model"], ["run", "model", "version"]),
    ],
)
def test_what_is_missing_of_a_succeeded_job_is_told_and_can_be_forgotten(
    store, queue, settings, experiment, sync, lost, parts
):
    job, what = finished_job(store, queue, experiment, "a")
    _, _ = finished_job(store, queue, experiment, "b")
    assert sync().complete
    lose(store, **{key: what[key] for key in lost})
    synced = sync()
    assert not synced.complete
    (missing,) = synced.to_json()["missing"]
    assert missing == {
        "job": job.id,
        "kind": "train",
        "experiment": "e",
        "run_id": what["run_id"],
        "model_uri": f"models:/lost/{what['version']}",
        "missing": parts,
        "deleted": "run" in parts,
    }
    lines = describe_missing(synced.missing, settings)
    assert lines[0].startswith(f"e: 1 succeeded train job ({job.id}): the {parts[0]} is ")
    assert lines[-1].startswith("to do these jobs again: `rankwise sync --forget-missing`, then `rankwise run FILE`")
    context = Context(settings=settings, store=store, queue=queue, reporter=Listener())
    forgotten = synchronize(context, timeout=20, forget_missing=True)
    assert [known.id for known in forgotten.forgotten] == [job.id]
    assert forgotten.complete
    known = queue.get(job.id)
    assert (known.state, known.result, known.mlflow_run_id) == ("cancelled", None, None)
    assert "its results were missing in sqlite:" in known.error
    assert sync().complete


def test_what_is_restored_as_the_advice_says_is_no_longer_missing(store, queue, settings, experiment, sync):
    _, what = finished_job(store, queue, experiment, "a")
    lose(store, run_id=what["run_id"], version=what["version"])
    advice = "\n".join(describe_missing(sync().missing, settings))
    assert f"mlflow runs restore --run-id {what['run_id']}" in advice
    store.client.restore_run(what["run_id"])
    advice = "\n".join(describe_missing(sync().missing, settings))
    assert f"mlflow.register_model('models:/{what['model']}', 'lost')" in advice
    mlflow.register_model(f"models:/{what['model']}", "lost")
    assert sync().complete


def test_a_version_under_another_name_is_not_missing(store, queue, experiment, sync):
    finished_job(store, queue, experiment, "a")
    store.client.rename_registered_model("lost", "renamed")
    assert sync().complete
    store.client.delete_registered_model("renamed")
    assert [result.parts for result in sync().missing] == [("version",)]


def test_a_lost_database_is_told_with_every_job(queue, tmp_path, settings, store, experiment):
    jobs = [finished_job(store, queue, experiment, f"arm{number}")[0].id for number in range(12)]
    other = prepared_home(tmp_path / "other")
    with Store.open(other) as empty:
        context = Context(settings=other, store=empty, queue=queue, reporter=Listener())
        synced = synchronize(context, timeout=5)
    assert [result.job.id for result in synced.missing] == jobs
    first, copy, again = describe_missing(synced.missing, other)
    named = ", ".join(map(str, jobs[:10]))
    assert (
        f"12 succeeded train jobs ({named} and 2 more): the run is missing, the model is missing, the version" in first
    )
    assert f"if {other.home / 'mlflow.db'} was deleted or replaced: put a copy of it back" in copy
    assert "rankwise sync --forget-missing" in again
