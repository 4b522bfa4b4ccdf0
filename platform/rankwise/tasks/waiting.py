"""Arms whose run has not begun, or is not there yet: until a worker begins with them the queue knows how they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from rankwise.evaluation.compare import ArmRecord, Comparison, compare
from rankwise.evaluation.gather import typed_params
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import JobStore
from rankwise.tasks.payload import Work
from rankwise.tracking.store import Store
from rankwise.tracking.sweeps import current_sweep, membership

_PAGE = 1000
# Of jobs without a run. What has succeeded has one, here or in another experiment, and is linked by whoever submits it.
_STATUS: Mapping[JobState, str] = {
    JobState.QUEUED: "SCHEDULED",
    JobState.RUNNING: "RUNNING",
    JobState.UPLOADING: "RUNNING",
    JobState.FAILED: "FAILED",
    JobState.CANCELLED: "KILLED",
}


def with_waiting(store: Store, queue: JobStore, comparison: Comparison, *, everything: bool = False) -> Comparison:
    """Take the arms without a run that has begun from the queue, with the state of their job in MLflow's words.

    Args:
        store: The MLflow store.
        queue: The job store.
        comparison: From `rankwise.evaluation.gather`.
        everything: Whether it has the arms of all sweeps.

    Raises:
        JobStoreError: The queue's database cannot be reached.
        TrackingError: The store cannot be reached.
    """
    known = {arm.spec_hash: arm for arm in comparison.arms}
    begun = {spec_hash for spec_hash, arm in known.items() if arm.status != "SCHEDULED"}
    jobs = [job for job in _train_jobs(queue, comparison.experiment) if job.spec_hash not in begun]
    if jobs and not everything and comparison.experiment_id is not None:
        sweep = current_sweep(store.runs(comparison.experiment_id, kind="sweep"))
        if sweep is not None:
            belongs = membership(sweep)
            jobs = [job for job in jobs if belongs(job.spec.get("parent_run_id"), job.spec_hash)]
    if not jobs:
        return comparison
    waiting = {job.spec_hash: _record(job, known.get(job.spec_hash)) for job in jobs}
    sorted_arms = compare(
        comparison.experiment,
        list({**known, **waiting}.values()),
        primary_metric=comparison.primary_metric,
        greater_is_better=comparison.greater_is_better,
    ).arms
    return replace(comparison, arms=sorted_arms)


def _train_jobs(queue: JobStore, experiment: str) -> Iterator[Job]:
    last = 0
    while page := queue.jobs(
        kinds=[JobKind.TRAIN], experiment=experiment, states=list(_STATUS), limit=_PAGE, after_id=last
    ):
        yield from page
        last = page[-1].id


def _record(job: Job, planned: ArmRecord | None) -> ArmRecord:
    if planned is not None:
        return replace(planned, status=_STATUS[job.state], reason=job.error)
    params = Work.of(job).arm.params
    return ArmRecord(
        spec_hash=job.spec_hash,
        run_id=job.mlflow_run_id or "",
        status=_STATUS[job.state],
        reason=job.error,
        params=typed_params({key: str(value) for key, value in params.items() if value is not None}),
        metrics={},
    )
