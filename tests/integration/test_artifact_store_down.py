"""The artifact store, a real S3 server, is away when adapters are to be stored: jobs wait, and nothing is retrained."""

import time

import pytest
from helpers.fault_table import record
from helpers.waiting import until
from helpers.workers import Process, adapters, at_rest, queue_of, saved_steps, submitted

from rankwise.jobs.job import JobKind, JobState

pytestmark = pytest.mark.faults

STEPS, SAVED = 150, 5
WORKER = ["worker", "--drain", "--max-arms", "2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The adapters of both arms, from a worker that nobody disturbed."""
    project = submitted(tmp_path_factory.mktemp("undisturbed"), [0], STEPS, SAVED)
    project.succeed(*WORKER)
    at_rest(project, STEPS)
    return sorted(adapters(project).values())


@pytest.mark.parametrize("proxied", [True, False], ids=["through the MLflow server", "directly"])
def test_an_artifact_store_that_is_away_at_the_end_is_waited_for_without_training_again(tmp_path, undisturbed, proxied):
    from helpers.object_store import BUCKET, ObjectStore, tracking_on

    store = ObjectStore()
    store.on()
    store.client().create_bucket(Bucket=BUCKET)
    try:
        with tracking_on(store, tmp_path / "server", proxied=proxied) as url:
            env = {"MLFLOW_TRACKING_URI": url, **store.environment}
            project = submitted(tmp_path / "project", [0], STEPS, SAVED, env)
            worker = Process(project, *WORKER, **env)
            until(lambda: saved_steps(project), what="a checkpoint")
            store.off()
            away = time.monotonic()
            with queue_of(project) as queue:
                until(lambda: queue.counts()[JobState.UPLOADING] == 2, what="the state uploading")
                until(lambda: "trained but not yet registered" in worker.said, 300, "a try that failed")
                assert {job.attempts for job in queue.jobs(kinds=[JobKind.TRAIN])} == {1}
                gone = time.monotonic() - away
                store.on()
                back = time.monotonic()
                assert worker.wait(600) == 0, worker.said
                took = time.monotonic() - back
                at_rest(project, STEPS, url)
                jobs = queue.jobs()
                assert {(job.attempts, job.failures, job.preemptions, job.lost) for job in jobs} == {(1, 0, 0, 0)}
            # A try that failed in the middle may have left a file, which gc removes.
            stored = store.read("adapter_model.safetensors")
            models = [job.result["model_id"] for job in jobs if job.kind is JobKind.TRAIN]
            assert sorted(file for key, file in stored.items() if any(each in key for each in models)) == undisturbed
    finally:
        store.off()
    record(
        f"artifact store (S3, {'through the MLflow server' if proxied else 'directly'}) down at the end",
        "the jobs wait as uploading and are published without training, 1 version each",
        f"down for {gone:.0f} s; all published and evaluated {took:.0f} s after its return, in attempt 1, "
        "adapters equal",
    )
