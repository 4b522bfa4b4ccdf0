"""The project backend `rankwise`: `mlflow run . --backend rankwise -P experiment=experiments/diamonds-rank.yaml`.

Submits as `rankwise submit` does; workers anywhere do the jobs. MLflow's command line ends then, as it does with every
backend of a plugin; `mlflow.projects.run` waits for the end of the sweep unless told otherwise, and Ctrl-C cancels it.
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
from rankwise.tasks.context import open_context
from rankwise.tasks.rows import RowsCache
from rankwise.tasks.search import is_pruned
from rankwise.tasks.submit import prepare, submit
from rankwise.tasks.sweep import jobs_of_sweep
from rankwise.tracking.connection import connect
from rankwise.tracking.project import ProjectBackend, ProjectRequest, Status
from rankwise.tracking.query import get_run

logger = logging.getLogger(__name__)
_POLL_S = 2.0
# The worker of the last job compares the arms and ends the sweep's run; a search's next round comes in this time too.
_SETTLING_S = 120.0
_LEVELS: dict[LineKind, int] = {
    "say": logging.INFO,
    "done": logging.INFO,
    "warn": logging.WARNING,
    "fail": logging.ERROR,
}


class RankwiseBackend(ProjectBackend):
    """MLflow makes one for each `mlflow run`."""

    def submit(self, request: ProjectRequest, settings: Settings) -> SweepSubmission:
        """Queue what is missing of the definition.

        Raises:
            RankwiseError: As `rankwise submit`.
        """
        experiment = load_experiment(request.file, request.overrides)
        experiment.require_known_arms()
        voice = LogReporter()
        with open_context(settings, voice) as context:
            prepared = prepare(context, experiment, RowsCache(settings, voice), preflight=request.preflight)
            sets = [f"--set={each}" for each in request.overrides]
            command = shlex.join(["rankwise", "run", str(request.file), *sets])
            submitted = submit(context, prepared, command=command, priority=request.priority)
        waiting = sum(not job.ended for job in submitted.jobs)
        logger.info("%d jobs of %s, %d of them to do", len(submitted.jobs), submitted.experiment, waiting)
        return SweepSubmission(settings, submitted.experiment, submitted.parent_run_id, submitted.jobs)


class SweepSubmission:
    """A sweep in the queue, as `rankwise.tracking.project.Submission` wants it.

    Attributes:
        run_id: The run of the sweep.
    """

    def __init__(
        self,
        settings: Settings,
        experiment: str,
        run_id: str,
        jobs: tuple[Job, ...],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Of jobs that were submitted; a search adds more."""
        self.run_id = run_id
        self._settings = settings
        self._experiment = experiment
        # Arms that another sweep has trained are of this one too.
        self._ids = {job.id for job in jobs}
        self._sleep = sleep

    def wait(self) -> bool:
        """Return when all jobs have ended and the sweep's run has: whether all of them succeeded."""
        settled = None
        with self._queue() as queue:
            while True:
                jobs = self._jobs(queue)
                if all(job.ended for job in jobs):
                    settled = settled or time.monotonic() + _SETTLING_S
                    if self._run_has_ended() or time.monotonic() > settled:
                        return _all_well(jobs)
                else:
                    settled = None
                self._sleep(_POLL_S)

    def status(self) -> Status:
        """By the queue, which is the truth about work."""
        with self._queue() as queue:
            jobs = self._jobs(queue)
        if not all(job.ended for job in jobs):
            begun = any(job.state is not JobState.QUEUED for job in jobs)
            return "RUNNING" if begun else "SCHEDULED"
        if _all_well(jobs):
            return "FINISHED"
        return "FAILED" if any(job.state is JobState.FAILED for job in jobs) else "KILLED"

    def cancel(self) -> None:
        """Cancel what has not ended; what is worked on ends after its step, as with `rankwise cancel`."""
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
    """Reports through the log: MLflow's command has no bars."""

    def line(self, kind: LineKind, text: str) -> None:
        """One line."""
        logger.log(_LEVELS[kind], text)

    def show(self, renderable: Any) -> None:
        """Tables stay in the run's artifacts."""

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[tuple[Advance, Remark]]:
        """A line when it begins."""
        logger.info(description)
        yield (lambda amount: None), (lambda text: None)


def _all_well(jobs: list[Job]) -> bool:
    """Whether all jobs have succeeded, but for arms that early stopping has ended, and their evaluations."""
    pruned = {job.spec["arm"] for job in jobs if is_pruned(job)}
    return all(
        job.state is JobState.SUCCEEDED or (job.state is JobState.CANCELLED and job.spec["arm"] in pruned)
        for job in jobs
    )
