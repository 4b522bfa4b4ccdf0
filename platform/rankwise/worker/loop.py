"""The worker's loop: claim a pack, run it, settle what follows, until nothing is left or a stop is requested.

1. Return jobs of dead workers to the queue.
2. Claim a pack, leave a share to other workers, run it, and settle: prune, promote or propose arms, finish sweeps.
3. Without a claim, retry pending uploads, then pending follow-ups; otherwise decide whether the loop is done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil

from rankwise.exceptions import JobStoreError, TrackingError
from rankwise.jobs.job import MAX_ARMS, Job, JobState, Outcome, Worker
from rankwise.jobs.store import JobStore
from rankwise.lock_holders import start_of
from rankwise.reporter import Reporter
from rankwise.worker.child import Child
from rankwise.worker.child_client import ChildClient, CommandFailedError, as_exception
from rankwise.worker.heartbeat import Heartbeat, Stop, Timing, lease_clock
from rankwise.worker.job_runner import JobRunner, Note, OutageBackoff, PendingFollowUps, PendingUploads
from rankwise.worker.lock_watch import ANNOUNCES, CHILD, CHILD_STARTED, STARTED
from rankwise.worker.protocol import Message, Result, ResultFiles

_MISSED_ANNOUNCEMENTS = 3
"""A worker that has missed so many announcements gets no share of the work."""
_MAX_HELD_JOBS = 1000
"""The most queued jobs that an idle worker checks for held ones."""
_UNFINISHED = (JobState.QUEUED, JobState.RUNNING, JobState.UPLOADING)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Which jobs a loop takes, and when it ends.

    Attributes:
        among: Only these jobs and those that follow from them (the next arms of a search). None: all.
        drain: End when no job is left.
        watched: The run of a sweep that another process finishes.
        fail_on_outage: Raise the error of an outage instead of waiting.
    """

    among: frozenset[int] | None = None
    drain: bool = False
    experiment: str | None = None
    watched: str | None = None
    max_arms: int = MAX_ARMS
    fail_on_outage: bool = False


class WorkerLoop:
    """One worker: heartbeat, child, loop. A context manager."""

    def __init__(
        self,
        queue: JobStore,
        *,
        worker: Worker,
        spawn: Callable[[], Child],
        results: ResultFiles,
        reporter: Reporter,
        stop: Stop,
        timing: Timing | None = None,
        info: dict[str, Any] | None = None,
        note: Note = lambda job, event, more: None,
    ) -> None:
        self._queue = queue
        self._worker = worker
        self._results = results
        self._reporter = reporter
        self._stop = stop
        self._timing = timing or Timing()
        identity = {STARTED: start_of(worker.pid), ANNOUNCES: self._timing.announce}
        self._info = {"state": "idle", **identity, **(info or {})}
        self._heartbeat = Heartbeat(queue, self._timing, worker, self._announced_info)
        self._uploads = PendingUploads(self._timing)
        self._outages = OutageBackoff(self._timing, reporter)
        self._child = ChildClient(spawn, reporter=reporter, heartbeat=self._heartbeat, timing=self._timing, stop=stop)
        self._runner = JobRunner(
            queue, self._child, self._heartbeat, self._uploads, self._outages, results, reporter, note
        )
        self._last_reclaim = float("-inf")
        self._last_settle = float("-inf")
        self._follow_ups = PendingFollowUps(self._timing)
        self._open_sweeps_checked = False
        self._waiting_logged = False
        self._among: set[int] | None = None
        self._unsettled = True
        self._finishes_sweeps = True
        self._watched: str | None = None

    def _announced_info(self) -> dict[str, Any]:
        child = self._child.pid
        return {**self._info, CHILD: child, CHILD_STARTED: None if child is None else start_of(child)}

    def __enter__(self) -> WorkerLoop:
        self._results.remove_stale()
        self._heartbeat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._child.__exit__(kind, error, trace)
        finally:
            self._heartbeat.__exit__(kind, error, trace)

    def call(self, command: Message, *, at_once: bool = True) -> dict[str, Any]:
        """Run a command that is not a job in the child; raises what the child raised."""
        try:
            return self._child.call(command, at_once=at_once)
        except CommandFailedError as error:
            raise as_exception(error.failure) from None

    def work(self, options: LoopOptions) -> frozenset[int]:
        """Claim and run jobs until none is left or a stop is requested; the ids of these jobs if `among` is set.

        Raises:
            RankwiseError: An outage, if `options.fail_on_outage` is set or retries are exhausted.
        """
        self._among = None if options.among is None else set(options.among)
        self._unsettled = True
        self._finishes_sweeps = options.among is None
        self._watched = options.watched
        self._outages.fail_on_outage = options.fail_on_outage
        try:
            while not self._stop.requested:
                try:
                    if not self._iterate(options):
                        break
                except JobStoreError as error:
                    self._outages.wait(error, self._stop, is_brief=self._outages.is_brief_queue_outage())
        finally:
            self._return_uploads()
        return frozenset(self._among or ())

    def await_workers(self, count: int, timeout: float) -> bool:
        """Wait until `count` workers are running, including this one; whether they are."""
        deadline = time.monotonic() + timeout
        while self._count_workers() < count:
            if self._stop.requested or time.monotonic() > deadline:
                return False
            self._stop.wait(self._timing.poll / 5)
        return True

    def failed(self, ids: Collection[int]) -> list[Job]:
        """Those of these jobs that have failed and are not retried."""
        return [job for job in self._queue.jobs(ids=sorted(ids)) if job.state is JobState.FAILED]

    def _iterate(self, options: LoopOptions) -> bool:
        """False when nothing is left to do."""
        self._reclaim()
        since = lease_clock()
        jobs = self._queue.claim(
            self._worker,
            lease=self._timing.lease,
            max_arms=options.max_arms,
            among=self._among,
            experiment=options.experiment,
        )
        self._outages.queue_recovered()
        if jobs:
            self._waiting_logged = False
            self._run_claim(jobs, since)
            return True
        if due := self._uploads.take_due():
            self._run_jobs("publish", due)
            self._uploads.forget(due)
            return True
        if self._follow_ups.due():
            self._settle([])
            return True
        if self._is_done(options):
            return False
        self._stop.wait(self._timing.poll)
        return True

    def _leave_share(self, jobs: list[Job]) -> list[Job]:
        """Return a share of the claim to the queue for other workers, unless it resumes an earlier pack."""
        if len(jobs) == 1 or any(job.preemptions or job.lost or job.failures for job in jobs):
            return jobs
        try:
            count = self._count_workers()
            queued = len(jobs) + self._queue.counts()[JobState.QUEUED]
        except JobStoreError as error:
            # An error here would leave the claimed jobs without a worker.
            logger.warning("keeping all claimed jobs: %s", error)
            return jobs
        if count <= 1:
            return jobs
        return self._runner.keep_first(jobs, max(1, math.ceil(queued / count)))

    def _count_workers(self) -> int:
        recent = [info for info in self._queue.workers() if info.silent < _MISSED_ANNOUNCEMENTS * self._timing.announce]
        alive = set(psutil.pids())
        return sum(info.host != self._worker.host or info.pid in alive for info in recent)

    def _run_claim(self, jobs: list[Job], since: float) -> None:
        self._heartbeat.hold(jobs, since)
        jobs = self._runner.isolate_suspect(self._leave_share(jobs))
        self._run_jobs(str(jobs[0].kind), jobs)

    def _settle(self, jobs: list[Job]) -> None:
        """Do what follows from ended jobs. The first call also finishes sweeps that dead workers left."""
        self._last_settle = time.monotonic()
        if self._stop.requested:
            return
        self._unsettled = True
        ids = sorted(self._follow_ups.jobs | {job.id for job in jobs})
        has_unfinished = bool(self._among) and bool(self._unfinished())
        command = {
            "do": "settle",
            "jobs": ids,
            "open": not self._open_sweeps_checked,
            "complete": self._finishes_sweeps,
            "watched": self._watched,
        }
        try:
            value = self._child.call(command)
        except CommandFailedError as error:
            if not jobs:
                logger.warning("the follow-ups of jobs %s failed: %s", ids, error.failure.text)
            else:
                self._reporter.warn(f"after {', '.join(job.title for job in jobs)}: {error.failure.text}")
            if error.failure.environment:
                self._follow_ups.add(ids)
            else:
                self._follow_ups.done()
            return
        self._open_sweeps_checked = True
        self._follow_ups.done()
        if self._among is not None:
            new = set(value["submitted"]) - self._among
            self._among |= new
            self._unsettled = has_unfinished or bool(new)

    def _unfinished(self) -> list[Job]:
        return self._queue.jobs(ids=sorted(self._among or ()), states=_UNFINISHED)

    def _run_jobs(self, kind: str, jobs: list[Job]) -> None:
        self._info["state"] = f"{kind} of {len(jobs)}"
        failure = self._runner.run(kind, jobs)
        self._info["state"] = "idle"
        if failure is None or not failure.environment:
            self._outages.succeeded()
            if failure is not None and failure.trace is not None:
                self._reporter.fail(failure.trace)
            self._settle(jobs)
            return
        if self._stop.requested:
            return
        error = as_exception(failure)
        assert isinstance(error, Exception)
        self._outages.wait(error, self._stop)

    def _reclaim(self) -> None:
        now = time.monotonic()
        if now - self._last_reclaim < self._timing.reclaim:
            return
        self._last_reclaim = now
        for job in self._queue.reclaim(host=self._worker.host, alive=psutil.pids()):
            logger.info("%s was returned to the queue: its worker died", job.title)

    def _is_done(self, options: LoopOptions) -> bool:
        if self._uploads.pending:
            if (options.drain or self._among is not None) and self._uploads.is_exhausted():
                names = ", ".join(job.title for job in self._uploads.all())
                raise TrackingError(
                    f"the tracking server has accepted nothing for {self._timing.upload:,.0f} s: {names} are computed "
                    "and return to the queue; the next worker of this home publishes them without training"
                )
            return False
        if self._among is not None:
            unfinished = self._unfinished()
        elif options.drain:
            unfinished = self._queue.jobs(states=_UNFINISHED, experiment=options.experiment, limit=100)
        else:
            if self._queue.held():
                self._settle_held_jobs(self._queue.jobs(states=[JobState.QUEUED], limit=_MAX_HELD_JOBS))
            return False
        if not unfinished and self._among is None and self._follow_ups.pending:
            if self._follow_ups.is_exhausted():
                raise TrackingError(
                    f"the tracking server has accepted nothing for {self._timing.upload:,.0f} s: every job has ended, "
                    "but sweeps lack their comparison and alias; run `rankwise sync` when it is available again"
                )
            return False
        if not unfinished:
            # Another worker may have ended one of these jobs, with follow-ups that are not known here.
            return self._among is None or not self._unsettled or not self._finds_more_jobs()
        if not self._settle_held_jobs(unfinished) and not self._waiting_logged:
            self._waiting_logged = True
            self._reporter.say(f"waiting: {len(unfinished)} jobs are held by another worker or wait for a retry")
        return False

    def _finds_more_jobs(self) -> bool:
        before = set(self._among or ())
        self._settle(self._queue.jobs(ids=sorted(before)))
        return self._among is not None and self._among != before

    def _settle_held_jobs(self, unfinished: list[Job]) -> bool:
        """Settle held jobs if nothing else runs: the worker that had to decide on them died."""
        held = [job for job in unfinished if job.held]
        all_queued = all(job.state is JobState.QUEUED for job in unfinished)
        if not held or not all_queued or time.monotonic() - self._last_settle <= self._timing.reclaim:
            return False
        self._settle(held)
        return True

    def _return_uploads(self) -> None:
        """Return pending uploads to the queue; the next worker publishes them without training."""
        for job in self._uploads.release():
            assert job.token is not None
            self._runner.finish(job, Result(token=job.token, outcome=Outcome.PREEMPTED))
