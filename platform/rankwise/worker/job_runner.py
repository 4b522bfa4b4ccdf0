"""Runs claimed jobs in the child and reports their ends to the queue; backoff for outages, uploads and follow-ups.

An outage (a full disk, a server or database that is unavailable) does not count as a failure of the job.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial

from rankwise.backoff import Backoff
from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import Job, JobState, Outcome
from rankwise.jobs.store import JobStore
from rankwise.reporter import Reporter
from rankwise.worker.child_client import ChildClient, CommandFailedError
from rankwise.worker.heartbeat import Heartbeat, Stop, Timing
from rankwise.worker.protocol import Failure, Message, Result, ResultFiles


class OutageBackoff:
    """Waits while the environment of a worker is failing."""

    def __init__(self, timing: Timing, reporter: Reporter) -> None:
        self._reporter = reporter
        self._first = timing.pause
        self._backoff = Backoff(timing.pause, timing.longest_pause)
        self._queue_backoff = Backoff(timing.pause, timing.longest_pause, give_up_after=timing.lease)
        self.fail_on_outage = False
        """Whether an outage raises instead: a user is watching."""

    @property
    def first_wait(self) -> float:
        """Seconds until a job that met an outage may be claimed again."""
        return max(self._first, self._backoff.delay)

    def is_brief_queue_outage(self) -> bool:
        """Count a failure of the queue; whether it has been failing for less than a lease."""
        self._queue_backoff.fail()
        return not self._queue_backoff.is_exhausted

    def queue_recovered(self) -> None:
        """The queue answered."""
        self._queue_backoff.reset()

    def succeeded(self) -> None:
        """A pack ran without an outage."""
        self._backoff.reset()

    def wait(self, error: Exception, stop: Stop, *, is_brief: bool = False) -> None:
        """Wait until the delay is over or a stop is requested; raise `error` if `fail_on_outage` applies."""
        if self.fail_on_outage and not is_brief:
            raise error
        pause = self._backoff.fail()
        self._reporter.warn(f"{error}; retrying in {pause:,.0f} s")
        stop.wait(pause)


class PendingUploads:
    """Jobs that are computed but not published, because the tracking server was unavailable."""

    def __init__(self, timing: Timing) -> None:
        self._longest_wait = timing.upload
        self._jobs: dict[int, Job] = {}
        self._since: dict[int, float] = {}
        self._backoff = Backoff(timing.pause, timing.longest_pause)
        self._attempted = True

    @property
    def pending(self) -> bool:
        """Whether there are any."""
        return bool(self._jobs)

    def all(self) -> list[Job]:
        """All pending jobs."""
        return list(self._jobs.values())

    def add(self, job: Job) -> None:
        """A job could not be published; it is retried after a delay."""
        self._jobs[job.id] = job
        self._since.setdefault(job.id, time.monotonic())
        if self._attempted:
            # Once per attempt: the jobs of a pack are added one by one.
            self._attempted = False
            self._backoff.fail()
        else:
            self._backoff.restart()

    def take_due(self) -> list[Job]:
        """The jobs to retry now, all over the same base."""
        if not self._jobs or not self._backoff.is_due:
            return []
        self._attempted = True
        first = next(iter(self._jobs.values()))
        jobs = [job for job in self._jobs.values() if job.pack_key == first.pack_key]
        for job in jobs:
            del self._jobs[job.id]
        return jobs

    def forget(self, jobs: Collection[Job]) -> None:
        """These jobs are published or returned to the queue."""
        for job in jobs:
            if job.id not in self._jobs:
                self._since.pop(job.id, None)
        if not self._since:
            self._attempted = True
            self._backoff.reset()

    def release(self) -> list[Job]:
        """Remove and return all jobs, to give them back to the queue."""
        jobs, self._jobs = self.all(), {}
        self.forget(jobs)
        return jobs

    def is_exhausted(self) -> bool:
        """Whether a job has been pending for longer than `Timing.upload`."""
        now = time.monotonic()
        return any(now - self._since[job_id] > self._longest_wait for job_id in self._jobs)


class PendingFollowUps:
    """Ended jobs whose follow-ups (pruning, new arms, comparison, alias) failed and are retried."""

    def __init__(self, timing: Timing) -> None:
        self._backoff = Backoff(timing.pause, timing.longest_pause, give_up_after=timing.upload)
        self.jobs: frozenset[int] = frozenset()
        """Their ids."""

    @property
    def pending(self) -> bool:
        """Whether there are any."""
        return self._backoff.is_failing

    def add(self, jobs: Collection[int]) -> None:
        """An attempt failed; the delay before the next one grows."""
        self._backoff.fail()
        self.jobs |= frozenset(jobs)

    def due(self) -> bool:
        """Whether to retry now."""
        return self.pending and self._backoff.is_due

    def done(self) -> None:
        """An attempt succeeded."""
        self._backoff.reset()
        self.jobs = frozenset()

    def is_exhausted(self) -> bool:
        """Whether they have been pending for longer than `Timing.upload`."""
        return self._backoff.is_exhausted


_FAILURES_BEFORE_ISOLATION = 2
"""A job with so many failures runs alone, so that it cannot crash the others of its pack."""
_RETRY_S = 0.5


Note = Callable[[Job, str, str | None], None]
"""Writes an error, and its traceback or the child's last output, into a job's log."""


class JobRunner:
    """Runs claimed jobs and reports how they ended."""

    def __init__(
        self,
        queue: JobStore,
        child: ChildClient,
        heartbeat: Heartbeat,
        uploads: PendingUploads,
        outages: OutageBackoff,
        results: ResultFiles,
        reporter: Reporter,
        note: Note,
    ) -> None:
        self._queue = queue
        self._child = child
        self._heartbeat = heartbeat
        self._uploads = uploads
        self._outages = outages
        self._results = results
        self._reporter = reporter
        self._note = note

    def run(self, kind: str, jobs: list[Job]) -> Failure | None:
        """Run jobs in the child and finish each as its result arrives; why the command failed, if it did."""
        unfinished = {job.token: job for job in jobs if job.token is not None}
        ended: list[tuple[Job, Result]] = []

        def on_event(message: Message) -> None:
            token = message["token"]
            match message["event"]:
                case "progress":
                    self._heartbeat.add_progress(token, message["values"])
                case "result":
                    result = self._results.read(token)
                    assert result is not None, f"the child reported a result of {token}, but there is no file"
                    job = unfinished.pop(token)
                    if result.outcome is Outcome.PREEMPTED and self._heartbeat.holds(token):
                        # Finished with the others: on its own, another worker could claim it without its pack.
                        ended.append((job, result))
                        return
                    if result.error is not None:
                        self._note(job, result.error, None)
                    self.finish(job, result)
                case "waiting":
                    self._uploads.add(unfinished.pop(token))
                    self._reporter.warn(message["reason"])
                case other:
                    raise AssertionError(f"unknown event {other!r}")

        failure = None
        try:
            self._child.call({"do": kind, "jobs": [asdict(job) for job in jobs]}, on_event)
        except CommandFailedError as error:
            failure = error.failure
        for token, job in unfinished.items():
            # A child that died may have written the file without sending the event.
            result = self._results.read(token)
            if result is None and failure is not None:
                if not _is_interruption(failure):
                    self._note(job, failure.text.partition("\n")[0], failure.trace or failure.output)
                result = Result(token=token, outcome=Outcome(failure.outcome), error=_reason(failure))
            missing = Result(
                token=token, outcome=Outcome.FAILED, error="the worker process reported no result for this job"
            )
            ended.append((job, result or missing))
        self._finish_all(ended)
        return failure

    def isolate_suspect(self, jobs: list[Job]) -> list[Job]:
        """Keep one job that has failed often, alone, and return the others to the queue."""
        suspects = [job for job in jobs if job.failures >= _FAILURES_BEFORE_ISOLATION]
        if not suspects or len(jobs) == 1:
            return jobs
        return self.keep_first([suspects[0], *(job for job in jobs if job is not suspects[0])], 1)

    def keep_first(self, jobs: list[Job], count: int) -> list[Job]:
        """Keep the first `count` jobs and return the others to the queue as if never claimed."""
        for job in jobs[count:]:
            assert job.token is not None
            self.finish(job, Result(token=job.token, outcome=Outcome.RETURNED))
        return jobs[:count]

    def finish(self, job: Job, result: Result) -> None:
        """Report the end of a job to the queue, retrying until the lease ends."""
        wait = self._retry_delay(result)

        def report() -> Collection[str]:
            accepted = self._queue.finish(
                result.token, result.outcome, result=result.result, error=result.error, wait=wait
            )
            return [result.token] if accepted else []

        self._report([(job, result)], report)

    def _finish_all(self, ended: Sequence[tuple[Job, Result]]) -> None:
        """Finish several jobs; those with the same outcome and no result in one transaction."""
        groups: dict[tuple[Outcome, str | None], list[tuple[Job, Result]]] = defaultdict(list)
        for job, result in ended:
            if result.result is None:
                groups[result.outcome, result.error].append((job, result))
            else:
                self.finish(job, result)
        for (outcome, error), pack in groups.items():
            tokens, wait = [result.token for _, result in pack], self._retry_delay(pack[0][1])
            self._report(pack, partial(self._queue.finish_together, tokens, outcome, error=error, wait=wait))

    def _report(self, ended: Sequence[tuple[Job, Result]], report: Callable[[], Collection[str]]) -> None:
        """Call `report` until the queue returns the tokens that were still valid, or all leases have ended."""
        while True:
            try:
                accepted = report()
                break
            except JobStoreError as error:
                if not any(self._heartbeat.confirmed(result.token) for _, result in ended):
                    for job, result in ended:
                        self._reporter.warn(
                            f"{job.title}: the queue was unavailable for longer than the lease: {error}"
                        )
                        self._heartbeat.release(result.token)
                    return
                time.sleep(_RETRY_S)
        for job, result in ended:
            self._heartbeat.release(result.token)
            self._results.remove(result.token)
            if result.token not in accepted:
                self._reporter.warn(f"{job.title} was taken over by another worker; this attempt is discarded")
            elif result.outcome in (Outcome.FAILED, Outcome.FATAL):
                self._reporter.fail(f"{job.title}{self._next_step(job)}: {result.error}")

    def _next_step(self, job: Job) -> str:
        try:
            after, time = self._queue.get(job.id), self._queue.time()
        except JobStoreError:
            return ""
        if after.state is JobState.QUEUED:
            return f", retried in {max(0.0, after.not_before - time):.0f} s"
        return ", not retried" if after.state is JobState.FAILED else ""

    def _retry_delay(self, result: Result) -> float:
        """Seconds until a job that met an outage may be claimed again."""
        met_outage = result.outcome is Outcome.PREEMPTED and result.error is not None
        return self._outages.first_wait if met_outage and not self._outages.fail_on_outage else 0.0


def _is_interruption(failure: Failure) -> bool:
    return failure.outcome == Outcome.PREEMPTED and not failure.environment


def _reason(failure: Failure) -> str | None:
    return None if _is_interruption(failure) else failure.text
