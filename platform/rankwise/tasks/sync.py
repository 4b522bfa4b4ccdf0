"""Synchronization: updates MLflow (the view) from the outboxes and the queue (the source of truth).

1. Deliver what dead processes left in outboxes.
2. Remove surplus versions. MLflow has no compare-and-set, so two attempts of a job may both register; an idle job has
   one version.
3. Give runs that look open the state of their job if it has ended.
4. Give sweeps whose jobs have all ended their comparison, report and alias.
5. Look for the run, the LoggedModel and the version of every job that has succeeded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankwise.exceptions import TrackingError
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import every_job
from rankwise.redact import redact
from rankwise.tasks.context import Context
from rankwise.tasks.missing_results import MissingResult, jobs_to_repeat, missing_results
from rankwise.tasks.predict import EXPERIMENT as PREDICTIONS
from rankwise.tasks.sweep_lifecycle import finish_open_sweeps
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
class SyncResult:
    """What `synchronize` did; `error` says why the store ended it early.

    Attributes:
        refused: Records that MLflow rejected permanently, now or earlier: one line with path and number each.
        kept: URIs of versions that should be removed, with the reason why they were not.
        ended: Status given to runs, by run ID.
        missing: What MLflow lacks of succeeded jobs.
        forgotten: Jobs that are to be repeated, because something was missing.
    """

    outbox: SyncReport
    refused: tuple[str, ...]
    removed: tuple[str, ...]
    kept: Mapping[str, str]
    ended: Mapping[str, str]
    finished: tuple[str, ...] = ()
    missing: tuple[MissingResult, ...] = ()
    forgotten: tuple[Job, ...] = ()
    error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is pending and nothing needs attention."""
        outbox = self.outbox
        return not (outbox.waiting or outbox.problems or self.refused or self.kept or self.missing or self.error)

    def to_json(self) -> dict[str, Any]:
        """The result as `rankwise sync --json` prints it."""
        return {
            "delivered": list(self.outbox.delivered),
            "waiting": [{"run_id": run_id, "reason": reason} for run_id, reason in self.outbox.waiting.items()],
            "problems": list(self.outbox.problems),
            "refused": list(self.refused),
            "removed": list(self.removed),
            "kept": [{"model_uri": uri, "reason": reason} for uri, reason in self.kept.items()],
            "ended": [{"run_id": run_id, "status": status} for run_id, status in self.ended.items()],
            "finished": list(self.finished),
            "missing": [result.to_json() for result in self.missing],
            "forgotten": [job.id for job in self.forgotten],
            "error": self.error,
        }


def synchronize(context: Context, *, timeout: float, forget_missing: bool = False) -> SyncResult:
    """Run all steps; `timeout` limits the outboxes, in seconds.

    With `forget_missing`, succeeded jobs of which something is missing are cancelled, and a submission repeats them.
    """
    store = context.store
    outbox = store.sync(timeout)
    jobs = {job.id: job for job in map(_slim, every_job(context.queue))}
    removed: tuple[str, ...] = ()
    kept: Mapping[str, str] = {}
    ended: Mapping[str, str] = {}
    finished: tuple[str, ...] = ()
    missing: tuple[MissingResult, ...] = ()
    forgotten: tuple[Job, ...] = ()
    error = None
    try:
        versions = store.registry.search()
        missing = tuple(missing_results(store, jobs.values(), versions))
        if forget_missing and missing:
            ids = jobs_to_repeat(jobs.values(), missing)
            reason = f"its results were missing in {redact(context.settings.tracking_uri)}"
            forgotten = tuple(context.queue.forget(ids, reason))
            jobs |= {job.id: _slim(job) for job in forgotten}
            missing = tuple(result for result in missing if result.job.id not in {job.id for job in forgotten})
        removed, kept = remove_duplicates(store, jobs, versions)
        ended = _end_runs(store, jobs, frozenset(outbox.waiting))
        finished = finish_open_sweeps(context)
    except TrackingError as raised:  # Still report the completed steps.
        error = str(raised)
    return SyncResult(
        outbox=outbox,
        refused=refused_records(context.settings),
        removed=removed,
        kept=kept,
        ended=ended,
        finished=finished,
        missing=missing,
        forgotten=forgotten,
        error=error,
    )


def _slim(job: Job) -> Job:
    """A job without most of its spec, because a queue may hold very many."""
    return replace(job, spec={key: job.spec[key] for key in ("experiment_id", "bare") if key in job.spec})


def remove_duplicates(
    store: Store, jobs: Mapping[int, Job], found: Sequence[ModelVersion]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Remove versions that are not the result of the succeeded job that registered them; returns removed and kept URIs.

    `found` are all versions of the registry.
    Versions of unknown jobs and runs stay, and those of jobs that have not succeeded: the next attempt adopts them.
    """
    removed: list[str] = []
    kept: dict[str, str] = {}
    for (job_id, run_id), versions in versions_of_jobs(found).items():
        job = jobs.get(job_id)
        if job is None or not _is_surplus(job, run_id, versions):
            continue
        for version in versions:
            if version.uri == _result_uri(job):
                continue
            # Search results lack aliases.
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
    return (
        job.kind is JobKind.TRAIN
        and job.state is JobState.SUCCEEDED
        and job.mlflow_run_id == run_id
        and len(versions) > 1
        and any(version.uri == _result_uri(job) for version in versions)
    )


def _result_uri(job: Job) -> str | None:
    return (job.result or {}).get("model_uri")


def _end_runs(store: Store, jobs: Mapping[int, Job], undelivered: frozenset[str]) -> dict[str, str]:
    ended: dict[str, Job] = {}
    unfinished: set[str] = set()
    for job in jobs.values():
        # An evaluation writes to the train job's run; only the bare base's evaluation has its own.
        if job.mlflow_run_id is None or (job.kind is JobKind.EVALUATE and not job.spec.get("bare")):
            continue
        if job.ended:
            ended[job.mlflow_run_id] = job
        else:
            unfinished.add(job.mlflow_run_id)
    experiments = {str(job.spec["experiment_id"]) for job in ended.values() if "experiment_id" in job.spec}
    if any(job.kind is JobKind.PREDICT for job in ended.values()):
        experiments |= {
            experiment_id for experiment_id in [store.find_experiment(PREDICTIONS)] if experiment_id is not None
        }
    closed: dict[str, str] = {}
    for run in open_runs(store.client, experiments):
        if run.run_id not in ended or run.run_id in unfinished | undelivered or store.is_open(run.run_id):
            continue
        job = ended[run.run_id]
        status = _STATUS[job.state]
        reason = None if job.state is JobState.SUCCEEDED else job.error or str(job.state)
        close_run(store.client, run.run_id, status, reason, int(job.updated_at * 1000))
        closed[run.run_id] = status
    return closed
