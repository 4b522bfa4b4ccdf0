"""Bring MLflow up to what the queue and the outboxes know: MLflow is the view, the queue is the truth.

1. What processes that died or gave up have left in the outbox is delivered.
2. Versions that a job has registered beside its result are removed: two attempts may have registered at one time, since
   MLflow has no compare-and-set. At rest a job has one version.
3. Runs that look as if they went on, of jobs that have ended, get the state of their job.
4. Sweeps whose jobs have all ended and whose run looks open get their comparison, their report and their alias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rankwise.exceptions import TrackingError
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import every_job
from rankwise.tasks.context import Context
from rankwise.tasks.predict import EXPERIMENT as PREDICTIONS
from rankwise.tasks.sweep import finish_open
from rankwise.tracking.cleanup import close_run, open_runs, remove_version, versions_of_jobs
from rankwise.tracking.outbox_recovery import SyncReport, refused_records
from rankwise.tracking.registry import ModelVersion
from rankwise.tracking.run import Status
from rankwise.tracking.store import Store

_STATUS: dict[JobState, Status] = {
    JobState.SUCCEEDED: "FINISHED",
    JobState.FAILED: "FAILED",
    JobState.CANCELLED: "KILLED",
}


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What was done.

    Attributes:
        outbox: What became of the outboxes.
        refused: Records that MLflow has refused for good, now or earlier: a path and how many, one line each.
        removed: URIs of versions that were removed.
        kept: URIs of versions that should have been removed, and why they were not.
        ended: Run ids that got the state of their job, with that state.
        finished: Run ids of sweeps that were compared and ended.
        error: Why the rest could not be done: the store did not answer.
    """

    outbox: SyncReport
    refused: tuple[str, ...]
    removed: tuple[str, ...]
    kept: Mapping[str, str]
    ended: Mapping[str, str]
    finished: tuple[str, ...] = ()
    error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing waits and nothing needs a person."""
        return not (self.outbox.waiting or self.outbox.problems or self.refused or self.kept or self.error)

    def to_json(self) -> dict[str, Any]:
        """As `rankwise sync --json` prints it."""
        return {
            "delivered": list(self.outbox.delivered),
            "waiting": [{"run_id": run_id, "reason": reason} for run_id, reason in self.outbox.waiting.items()],
            "problems": list(self.outbox.problems),
            "refused": list(self.refused),
            "removed": list(self.removed),
            "kept": [{"model_uri": uri, "reason": reason} for uri, reason in self.kept.items()],
            "ended": [{"run_id": run_id, "status": status} for run_id, status in self.ended.items()],
            "finished": list(self.finished),
            "error": self.error,
        }


def synchronize(context: Context, *, timeout: float) -> Synced:
    """Do all of it.

    Args:
        context: The stores.
        timeout: Seconds for the outboxes.

    Raises:
        JobStoreError: The queue's database cannot be reached.
    """
    store = context.store
    outbox = store.sync(timeout)
    jobs = {job.id: job for job in map(_slim, every_job(context.queue))}
    removed: tuple[str, ...] = ()
    kept: Mapping[str, str] = {}
    ended: Mapping[str, str] = {}
    finished: tuple[str, ...] = ()
    error = None
    try:
        removed, kept = remove_duplicates(store, jobs)
        ended = _end_runs(store, jobs, frozenset(outbox.waiting))
        finished = finish_open(context)
    except TrackingError as raised:  # What has been done already is told all the same.
        error = str(raised)
    return Synced(
        outbox=outbox,
        refused=refused_records(context.settings),
        removed=removed,
        kept=kept,
        ended=ended,
        finished=finished,
        error=error,
    )


def _slim(job: Job) -> Job:
    """A job without most of its spec: a queue may hold very many."""
    return replace(job, spec={key: job.spec[key] for key in ("experiment_id", "bare") if key in job.spec})


def remove_duplicates(store: Store, jobs: Mapping[int, Job]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Remove versions that succeeded jobs have registered and do not name as their result.

    A version without a job's tag, or of a run that no job here has, is somebody else's and is not touched; neither is
    one of a job that has not succeeded, whose next attempt will adopt it.

    Args:
        store: The MLflow store.
        jobs: By number.

    Returns:
        The URIs of what was removed, and of what was kept although it is a duplicate, with the reason.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    removed: list[str] = []
    kept: dict[str, str] = {}
    for (job_id, run_id), versions in versions_of_jobs(store.registry).items():
        job = jobs.get(job_id)
        if job is None or not _is_surplus(job, run_id, versions):
            continue
        for version in versions:
            if version.uri == _result_uri(job):
                continue
            # Searching does not give the aliases.
            if aliases := store.registry.get(version.name, version.version).aliases:
                kept[version.uri] = (
                    f"{job.title} has {_result_uri(job)} as its result, but the alias {', '.join(aliases)} points "
                    "here: move the alias, then sync again"
                )
                continue
            remove_version(store.client, version)
            removed.append(version.uri)
    return tuple(removed), kept


def _is_surplus(job: Job, run_id: str, versions: list[ModelVersion]) -> bool:
    """Whether the job has a result among its versions, and others beside it."""
    return (
        job.kind is JobKind.TRAIN
        and job.state is JobState.SUCCEEDED
        and job.mlflow_run_id == run_id
        and len(versions) > 1
        and any(version.uri == _result_uri(job) for version in versions)
    )


def _result_uri(job: Job) -> str | None:
    return (job.result or {}).get("model_uri")


def _end_runs(store: Store, jobs: Mapping[int, Job], waiting: frozenset[str]) -> dict[str, str]:
    """Give runs that look open the state of their job, where that has ended."""
    ended: dict[str, Job] = {}
    living: set[str] = set()
    for job in jobs.values():
        # An evaluation writes to its arm's run, which is the train job's; only that of the bare base has its own.
        if job.mlflow_run_id is None or (job.kind is JobKind.EVALUATE and not job.spec.get("bare")):
            continue
        if job.ended:
            ended[job.mlflow_run_id] = job
        else:
            living.add(job.mlflow_run_id)
    experiments = {str(job.spec["experiment_id"]) for job in ended.values() if "experiment_id" in job.spec}
    if any(job.kind is JobKind.PREDICT for job in ended.values()):
        experiments |= {found for found in [store.find_experiment(PREDICTIONS)] if found is not None}
    done: dict[str, str] = {}
    for run in open_runs(store.client, experiments):
        if run.run_id not in ended or run.run_id in living | waiting or store.is_open(run.run_id):
            continue
        job = ended[run.run_id]
        status = _STATUS[job.state]
        reason = None if job.state is JobState.SUCCEEDED else job.error or str(job.state)
        close_run(store.client, run.run_id, status, reason, int(job.updated_at * 1000))
        done[run.run_id] = status
    return done
