from __future__ import annotations

import json
import os
import time
from functools import partial

import pytest
from click.testing import CliRunner
from helpers.local_store import prepared_home

from rankwise.jobs.job import JobKind, NewJob, Outcome, Worker
from rankwise.modeling.quantized_cache import CacheKey
from rankwise.settings import Settings
from rankwise.tasks.gc import find_garbage, remove_garbage
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.registry import JOB
from rankwise.tracking.store import Store

WORKER = Worker(name="w", host="here", pid=os.getpid())
DAY = 86_400
LIVE, DONE, OTHER = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with Store.open(prepared_home(tmp_path_factory.mktemp("home")), interval=0.05) as opened:
        yield opened


@pytest.fixture
def settings(tmp_path):
    return Settings.load({"RANKWISE_HOME": str(tmp_path / "home"), "RANKWISE_CACHE": str(tmp_path / "cache")})


@pytest.fixture
def garbage(store, queue, settings):
    """What is found, by kind."""

    def find(days=14):
        found = find_garbage(store, queue, settings, older_than=days * DAY)
        assert found.problems == ()
        return found.items

    return find


def submit(queue, spec_hash, **spec):
    arm = {"base_model": "org/base", "base_model_revision": "1" * 40, "init_from": None, **spec.pop("arm", {})}
    new = NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash=spec_hash, spec={"arm": json.dumps(arm), **spec})
    return queue.submit([new])[0]


def end(queue, outcome=Outcome.CANCELLED, **more):
    (job,) = queue.claim(WORKER, lease=60)
    queue.finish(job.token, outcome, **more)
    return job


def write(path, size=10, days=30):
    """A file that was neither read nor written for so long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    age(path, days)
    return path


def age(path, days):
    then = time.time() - days * DAY
    for each in [path, *path.rglob("*"), *path.parents[:4]]:
        os.utime(each, (then, then))


def names(items):
    return [item.name for item in items]


def test_checkpoints_of_arms_without_an_unfinished_job_go_when_they_are_old(settings, queue, garbage):
    submit(queue, DONE)
    end(queue)
    submit(queue, LIVE)
    root = settings.checkpoints
    shared = root / "1" / "step-00000020"
    for arm in (LIVE, DONE):
        write(shared / f"arm-{arm[:12]}" / "adapter" / "adapter_model.safetensors")
    write(root / "2" / "final" / f"arm-{DONE[:12]}" / "adapter" / "adapter_model.safetensors", size=25)
    write(root / "3" / "step-00000020" / f"arm-{OTHER[:12]}" / "state.json", size=5)
    write(root / "4" / "step-00000020" / f"arm-{DONE[:12]}" / "state.json", days=3)
    items = garbage()
    assert names(items) == [str(root / "2"), str(root / "3")]
    assert [item.bytes for item in items] == [25, 5]
    assert remove_garbage(items, queue) == list(items)
    assert sorted(path.name for path in root.iterdir()) == ["1", "4"]
    assert len(names(garbage(days=1))) == 1


def test_states_put_aside_of_pruned_arms_go_although_the_pack_is_needed(settings, queue, garbage):
    submit(queue, DONE)
    end(queue)
    submit(queue, LIVE)
    pack = settings.checkpoints / "1"
    for arm in (LIVE, DONE):
        write(pack / "aside" / f"arm-{arm[:12]}" / "step-00000020" / "state.json")
    items = garbage()
    assert [(item.kind, item.name) for item in items] == [("aside", str(pack / "aside" / f"arm-{DONE[:12]}"))]
    remove_garbage(items, queue)
    assert (pack / "aside" / f"arm-{LIVE[:12]}" / "step-00000020" / "state.json").exists()
    assert not (pack / "aside" / f"arm-{DONE[:12]}").exists()


def test_logs_of_ended_jobs_and_of_dead_workers_go_when_they_are_old(settings, queue, garbage):
    for spec_hash in (DONE, OTHER):
        submit(queue, spec_hash)
        end(queue)
    submit(queue, LIVE)
    jobs, workers = settings.home / "logs" / "jobs", settings.home / "logs" / "workers"
    for name, days in (("1.log", 30), ("2.log", 3), ("3.log", 30)):
        write(jobs / name, days=days)
    dead, alive = write(workers / "child-999999999-1.log"), write(workers / f"child-{os.getpid()}-1.stacks")
    items = garbage()
    assert names(items) == [str(jobs / "1.log"), str(dead)]
    assert [item.reason for item in items] == ["job 1 has ended", "its worker has ended"]
    queue.retry([1])
    assert names(remove_garbage(items, queue)) == [str(dead)]
    assert sorted(path.name for path in jobs.iterdir()) == ["1.log", "2.log", "3.log"]
    assert alive.exists()


def test_what_a_job_needs_by_now_is_left_although_it_was_found(settings, queue, garbage):
    write(settings.checkpoints / "2" / "step-00000020" / f"arm-{DONE[:12]}" / "state.json")
    items = garbage()
    assert len(items) == 1
    submit(queue, DONE)
    assert remove_garbage(items, queue) == []
    assert (settings.checkpoints / "2").is_dir()


def test_delivered_outboxes_go_and_others_and_those_of_living_writers_stay(settings, queue, garbage):
    make = partial(Outbox.create, settings.outbox, tracking_uri="x")
    waiting, delivered, living = make(run_id="waiting"), make(run_id="delivered"), make(run_id="living")
    for outbox in (waiting, delivered):
        outbox.append({"tags": {"a": "b"}})
    delivered.spool(b"x" * 1000, "a.txt")
    delivered.commit(delivered.end)
    waiting.release()
    delivered.release()
    write(settings.outbox / "gone.aaaaaaaa.offset")
    items = garbage()
    assert names(items) == [str(delivered.path), str(settings.outbox / "gone.aaaaaaaa.offset")]
    assert items[0].bytes > 1000
    remove_garbage(items, queue)
    assert sorted(path.name for path in settings.outbox.iterdir()) == sorted([waiting.path.name, living.path.name])
    living.close()


def quantized(settings, source, revision):
    key = CacheKey(
        weights=source,
        config="c",
        quantization={},
        compute_dtype="f",
        module_dtype="f",
        device_type="cpu",
        libraries={},
    )
    directory = key.directory(settings)
    write(directory / "model.safetensors", size=100)
    document = {
        "format": 1,
        "key": vars(key),
        "source": source,
        "revision": revision,
        "files": {"model.safetensors": {"bytes": 100, "sha256": "0"}},
    }
    (directory / "entry.json").write_text(json.dumps(document))
    age(directory, 30)
    return directory


def test_caches_go_by_age_and_by_what_no_job_needs(settings, queue, garbage):
    submit(queue, LIVE, arm={"base_model_revision": "1" * 40, "init_from": "models:/pricer/3"})
    quantized(settings, "org/base", "1" * 40)
    old = quantized(settings, "org/base", "2" * 40)
    adapters = settings.cache / "adapters"
    for name in ("pricer-2", "pricer-3"):
        write(adapters / name / "adapter_model.safetensors", size=7)
    tokens = write(settings.cache / "tokens" / "old.arrow")
    write(settings.cache / "tokens" / "used.arrow", days=0)
    items = garbage()
    assert [(item.kind, item.name, item.bytes) for item in items] == [
        ("quantized", str(old), 100),
        ("adapter", str(adapters / "pricer-2"), 7),
        ("tokens", str(tokens), 10),
    ]
    remove_garbage(items, queue)
    assert sorted(path.name for path in adapters.iterdir()) == ["pricer-3"]
    assert not tokens.exists()
    assert not old.exists()
    assert garbage() == ()


def test_a_base_that_a_job_has_not_pinned_yet_is_kept(settings, queue, garbage):
    submit(queue, LIVE, arm={"base_model_revision": None})
    quantized(settings, "org/base", "2" * 40)
    assert garbage() == ()


def test_tokens_that_an_old_waiting_job_may_need_are_kept(settings, queue, garbage):
    submit(queue, LIVE)
    write(settings.cache / "tokens" / "a.arrow", days=0)
    assert garbage(days=0) == ()
    end(queue)
    assert len(garbage(days=0)) == 1


def logged(store, run_id, experiment, job, name="adapter"):
    made = store.client.create_logged_model(experiment, name, run_id, tags={JOB: str(job)})
    path = store.settings.home / "weights"
    path.write_bytes(b"x" * 500)
    store.client.log_model_artifact(made.model_id, str(path))
    store.client.finalize_logged_model(made.model_id, "READY")
    return made.model_id


def test_logged_models_that_are_no_result_go_with_their_files(store, queue, garbage):
    experiment = store.experiment("orphans")
    runs = [store.start_run(experiment, name, status="SCHEDULED") for name in ("done", "failed", "elsewhere")]
    for run in runs:
        run.leave()
    done_run, failed_run, foreign_run = (run.run_id for run in runs)
    jobs = {}
    for spec_hash, run_id in ((DONE, done_run), (OTHER, failed_run)):
        jobs[run_id] = submit(queue, spec_hash, experiment_id=experiment)
        queue.assign_run(jobs[run_id].id, run_id)
    result, surplus = (logged(store, done_run, experiment, jobs[done_run].id) for _ in range(2))
    registered = logged(store, done_run, experiment, jobs[done_run].id)
    store.registry.ensure_model("pricer")
    store.client.create_model_version("pricer", f"models:/{registered}", done_run)
    failed = logged(store, failed_run, experiment, jobs[failed_run].id)
    foreign = logged(store, foreign_run, experiment, jobs[done_run].id)
    end(queue, Outcome.SUCCEEDED, result={"model_id": result})
    assert [item.name for item in garbage(days=-1)] == [f"models:/{surplus}"]
    end(queue, Outcome.FATAL, error="x")
    assert garbage() == ()
    items = garbage(days=-1)
    assert {item.name for item in items} == {f"models:/{surplus}", f"models:/{failed}"}
    assert [item.bytes for item in items] == [500, 500]
    remove_garbage(items, queue)
    left = {model.model_id for model in store.client.search_logged_models([experiment])}
    assert left == {result, registered, foreign}
    folders = {
        path.name for path in (store.settings.artifacts / "orphans" / "models").iterdir() if any(path.rglob("w*"))
    }
    assert folders == left


def test_the_command_says_what_it_would_free_and_frees_it(tmp_path, monkeypatch):
    from rankwise.cli.maintenance import gc

    settings = prepared_home(tmp_path / "home")
    monkeypatch.setenv("RANKWISE_CACHE", str(settings.cache))
    pack = settings.checkpoints / "2"
    write(pack / "final" / f"arm-{DONE[:12]}" / "state.json", size=1_500_000)
    dry = CliRunner().invoke(gc, ["--dry-run", "--json"], catch_exceptions=False)
    document = json.loads(dry.stdout)
    assert (document["dry_run"], document["bytes"], len(document["items"])) == (True, 1_500_000, 1)
    assert pack.is_dir()
    wet = CliRunner().invoke(gc, ["--older-than", "20d"], catch_exceptions=False)
    assert "no unfinished job has one of its arms" in wet.stdout
    assert "freed 1.50 MB in 1 entries" in wet.stderr
    assert not pack.exists()
    wrong = CliRunner().invoke(gc, ["--older-than", "soon"])
    assert "'soon' is not a duration; write 14d, 12h, 30m or 90s" in wrong.stderr
