"""What is computed and waits for the registry, published later by the same child: each arm over its own base."""

from __future__ import annotations

import pytest
from helpers.inline_worker import Listener, inline_worker, submission
from helpers.local_store import prepared_home
from helpers.project import sums, write_rows
from helpers.tiny import make_base
from helpers.waiting import until

import rankwise.flavor as flavor
from rankwise.exceptions import TrackingError
from rankwise.jobs.job import JobKind, JobState
from rankwise.jobs.store import JobStore
from rankwise.tasks.session import Session, token_of
from rankwise.tracking.store import Store
from rankwise.worker.loop import LoopOptions

DEFINITION = """\
version: 1
name: {name}
base_model: {base}
quantization: {{load_in_4bit: false}}
lora: {{r: 2, lora_alpha: 2*r, target_modules: [q_proj]}}
dataset:
  train: {rows}
  eval: {{split_from: train, rows: 6, seed: 0}}
  prompt: "{{a}} plus {{b}}"
  completion: "{{sum}}"
training: {{max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1e-2, max_length: 64}}
evaluation: {{metrics: [loss], primary_metric: eval.loss}}
register: {{name: {name}, alias: best}}
"""


@pytest.fixture
def settings(tmp_path):
    return prepared_home(tmp_path / "home")


@pytest.fixture
def queue(settings):
    store = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    yield store
    store.close()


def away(monkeypatch, times):
    """The registry takes nothing the first few times."""
    real, tries = flavor.log_adapter, []

    def log_adapter(*arguments, **named):
        tries.append(None)
        if len(tries) <= times:
            raise TrackingError("the registry is away")
        return real(*arguments, **named)

    monkeypatch.setattr(flavor, "log_adapter", log_adapter)


def test_arms_over_two_bases_wait_together_and_are_registered_over_their_own(settings, queue, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", sums(40))
    bases = {name: make_base(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))}
    away(monkeypatch, 2)
    with inline_worker(settings, Listener()) as loop:
        for name, base in bases.items():
            loop.call(submission(DEFINITION.format(name=name, base=base, rows=rows)))
        loop.work(LoopOptions(drain=True))
    jobs = queue.jobs(kinds=[JobKind.TRAIN])
    assert [(job.state, job.attempts) for job in jobs] == [(JobState.SUCCEEDED, 1)] * 2, [job.error for job in jobs]
    with Store.open(settings):
        for job in jobs:
            metadata = flavor.load_model(job.result["model_uri"], settings=settings).metadata
            assert metadata.base.source == str(bases[job.experiment])


def test_an_arm_whose_claim_ran_out_while_it_waited_is_published_under_the_next_one(
    settings, queue, tmp_path, monkeypatch
):
    """Server and queue were away for longer than the lease, and the same worker claims the arm again."""
    rows = write_rows(tmp_path / "rows.jsonl", sums(40))
    definition = DEFINITION.format(name="one", base=make_base(tmp_path / "one"), rows=rows)
    outage = ["away"]

    def wait_for_upload(session, job, reason):
        if outage:
            queue.reclaim(host="here")
            until(lambda: not session.claims.holds(token_of(job)), 20)
            outage.clear()
        waits(session, job, reason)

    waits = Session.wait_for_upload
    with inline_worker(settings, Listener()) as loop:
        loop.call(submission(definition))
        monkeypatch.setattr("rankwise.tracking.store.unreachable", lambda uri: outage[0] if outage else None)
        monkeypatch.setattr("rankwise.tasks.publish._DRAIN_S", 3.0)
        monkeypatch.setattr(Session, "wait_for_upload", wait_for_upload)
        loop.work(LoopOptions(drain=True))
    (job,) = queue.jobs(kinds=[JobKind.TRAIN])
    assert (job.state, job.attempts, job.lost) == (JobState.SUCCEEDED, 2, 1)
    with Store.open(settings) as store:
        run = store.client.get_run(job.mlflow_run_id)
        points = store.client.get_metric_history(job.mlflow_run_id, "train.loss")
    assert run.info.status == "FINISHED"
    assert sorted(point.step for point in points) == [1, 2]
    assert {"adapter.parameters", "train.seconds"} <= run.data.metrics.keys()
