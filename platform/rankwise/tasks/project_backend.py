"""MLflow project backend `rankwise`: submits a sweep and lets a program wait for it, poll it or cancel it.

`mlflow run . --backend rankwise -P experiment=experiments/diamonds-rank.yaml` submits as `rankwise submit` does, and
ends once the jobs are queued. `mlflow.projects.run` waits for the sweep by default; Ctrl-C cancels it.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rankwise.experiment.experiment import load_experiment
from rankwise.jobs.job import Job, JobState
from rankwise.jobs.store import JobStore
from rankwise.reporter import Advance, LineKind, Remark, Reporter
from rankwise.settings import Settings
from rankwise.tasks.adaptive_sweep import is_pruned
from rankwise.tasks.arm_rows import RowsCache
from rankwise.tasks.context import open_context
from rankwise.tasks.submit import prepare, submit
from rankwise.tasks.sweep_lifecycle import jobs_of_sweep
from rankwise.tracking.connection import connect
from rankwise.tracking.project import ProjectBackend, ProjectRequest, Status
from rankwise.tracking.query import get_run

logger = logging.getLogger(__name__)
_POLL_S = 2.0
# Time for the last worker to submit a search's next round, or to compare the arms and end the sweep's run.
_SETTLING_S = 120.0
_LEVELS: dict[LineKind, int] = {
    "say": logging.INFO,
    "done": logging.INFO,
    "warn": logging.WARNING,
    "fail": logging.ERROR,
}


class RankwiseBackend(ProjectBackend):
    """Backend that MLflow instantiates for each `mlflow run`."""

    def submit(self, request: ProjectRequest, settings: Settings) -> SweepSubmission:
        """Queue the missing jobs of a definition."""
        experiment = load_experiment(request.file, request.overrides)
        experiment.require_known_arms()
        reporter = LogReporter()
        with open_context(settings, reporter) as context:
            prepared = prepare(context, experiment, RowsCache(settings, reporter), preflight=request.preflight)
            options = [f"--set={override}" for override in request.overrides]
            command = shlex.join(["rankwise", "run", str(request.file), *options])
            submitted = submit(context, prepared, command=command, priority=request.priority)
        waiting = sum(not job.ended for job in submitted.jobs)
        logger.info("%d jobs of %s, %d of them to do", len(submitted.jobs), submitted.experiment, waiting)
        return SweepSubmission(settings, submitted.experiment, submitted.parent_run_id, submitted.jobs)


class SweepSubmission:
    """A submitted sweep; implements `rankwise.tracking.project.Submission`. `run_id` is the sweep's run."""

    def __init__(
        self,
        settings: Settings,
        experiment: str,
        run_id: str,
        jobs: tuple[Job, ...],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Track the submitted jobs; a search adds more."""
        self.run_id = run_id
        self._settings = settings
        self._experiment = experiment
        # Includes arms that another sweep has trained.
        self._ids = {job.id for job in jobs}
        self._sleep = sleep

    def wait(self) -> bool:
        """Block until all jobs and the sweep's run have ended; returns whether the sweep succeeded."""
        deadline = None
        with self._queue() as queue:
            while True:
                jobs = self._jobs(queue)
                if all(job.ended for job in jobs):
                    deadline = deadline or time.monotonic() + _SETTLING_S
                    if self._run_has_ended() or time.monotonic() > deadline:
                        return _has_succeeded(jobs)
                else:
                    deadline = None
                self._sleep(_POLL_S)

    def status(self) -> Status:
        """Status derived from the queue, which is authoritative."""
        with self._queue() as queue:
            jobs = self._jobs(queue)
        if not all(job.ended for job in jobs):
            begun = any(job.state is not JobState.QUEUED for job in jobs)
            return "RUNNING" if begun else "SCHEDULED"
        if _has_succeeded(jobs):
            return "FINISHED"
        return "FAILED" if any(job.state is JobState.FAILED for job in jobs) else "KILLED"

    def cancel(self) -> None:
        """Cancel unfinished jobs, as `rankwise cancel` does; running ones end after their step."""
        with self._queue() as queue:
            while open_ids := [job.id for job in self._jobs(queue) if not job.ended]:
                queue.cancel(open_ids)
                if all(job.ended for job in queue.jobs(ids=open_ids)):
                    return
                self._sleep(_POLL_S)

    @contextmanager
    def _queue(self) -> Iterator[JobStore]:
        queue = JobStore(self._settings.database_url, lock=self._settings.home / "queue.lock")
        try:
            yield queue
        finally:
            queue.close()

    def _jobs(self, queue: JobStore) -> list[Job]:
        self._ids |= {job.id for job in jobs_of_sweep(queue, self._experiment, self.run_id)}
        return queue.jobs(ids=sorted(self._ids))

    def _run_has_ended(self) -> bool:
        return get_run(connect(self._settings), self.run_id).status not in {"RUNNING", "SCHEDULED"}


class LogReporter(Reporter):
    """Reports to the log, because MLflow's command shows no progress bars."""

    def line(self, kind: LineKind, text: str) -> None:
        """Log one line."""
        logger.log(_LEVELS[kind], text)

    def show(self, renderable: Any) -> None:
        """Skip tables; they are among the run's artifacts."""

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[tuple[Advance, Remark]]:
        """Log the task's start."""
        logger.info(description)
        yield (lambda amount: None), (lambda text: None)


def _has_succeeded(jobs: list[Job]) -> bool:
    """Whether all jobs succeeded, apart from arms that early stopping pruned and their evaluations."""
    pruned = {job.spec["arm"] for job in jobs if is_pruned(job)}
    return all(
        job.state is JobState.SUCCEEDED or (job.state is JobState.CANCELLED and job.spec["arm"] in pruned)
        for job in jobs
    )
