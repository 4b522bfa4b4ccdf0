"""Jobs in a worker's hands: given to the child, and told to the queue as they end.

- An environment at fault: a full disk, a server or a database that is away. It is no job's fault; waiting helps.
- Jobs that are computed and wait for the tracking server: held, beaten for, and tried again from time to time.
- What follows from ended jobs and met a tracking server or a disk that was away: tried again from time to time.
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
from rankwise.worker.child import CommandFailedError, Conversation
from rankwise.worker.heartbeat import Heartbeat, Stop, Timing
from rankwise.worker.protocol import Failure, Message, Result, Results


class Outages:
    """What a worker does while its environment (a disk, a server, the queue's database) is at fault: it waits."""

    def __init__(self, timing: Timing, voice: Reporter) -> None:
        """Nothing is at fault."""
        self._voice = voice
        self._first = timing.pause
        self._backoff = Backoff(timing.pause, timing.longest_pause)
        self._queue = Backoff(timing.pause, timing.longest_pause, give_up_after=timing.lease)
        self.fragile = False
        """Whether an outage ends the loop: somebody watches, and would rather know."""

    @property
    def first_wait(self) -> float:
        """Seconds after which a job that met an outage may be claimed again."""
        return max(self._first, self._backoff.delay)

    def passing(self) -> bool:
        """Whether the queue has been unavailable for less than a lease, for which also one who watches waits."""
        self._queue.fail()
        return not self._queue.is_exhausted

    def over(self) -> None:
        """The queue answers."""
        self._queue.reset()

    def well(self) -> None:
        """A pack went through."""
        self._backoff.reset()

    def wait(self, error: Exception, stop: Stop, *, passing: bool = False) -> None:
        """Wait, longer than the last time, or until a stop is requested.

        Raises:
            Exception: `error`, where the loop is fragile and the outage is not a passing one.
        """
        if self.fragile and not passing:
            raise error
        pause = self._backoff.fail()
        self._voice.warn(f"{error}; trying again in {pause:,.0f} s")
        stop.wait(pause)


class Uploads:
    """Jobs of one worker that are computed and not published yet."""

    def __init__(self, timing: Timing) -> None:
        """No jobs."""
        self._longest_wait = timing.upload
        self._jobs: dict[int, Job] = {}
        self._since: dict[int, float] = {}
        self._backoff = Backoff(timing.pause, timing.longest_pause)
        self._tried = True

    @property
    def any(self) -> bool:
        """Whether something waits."""
        return bool(self._jobs)

    def all(self) -> list[Job]:
        """What waits."""
        return list(self._jobs.values())

    def add(self, job: Job) -> None:
        """A job's publication did not get through; the next try comes after a pause."""
        self._jobs[job.id] = job
        self._since.setdefault(job.id, time.monotonic())
        if self._tried:
            # Once for each try: the jobs of a pack come one by one.
            self._tried = False
            self._backoff.fail()
        else:
            self._backoff.restart()

    def take(self) -> list[Job]:
        """What is to be tried now, all of it over one base; the pause after another failure is longer."""
        if not self._jobs or not self._backoff.is_due:
            return []
        self._tried = True
        first = next(iter(self._jobs.values()))
        jobs = [job for job in self._jobs.values() if job.pack_key == first.pack_key]
        for job in jobs:
            del self._jobs[job.id]
        return jobs

    def forget(self, jobs: Collection[Job]) -> None:
        """Published, or given back."""
        for job in jobs:
            if job.id not in self._jobs:
                self._since.pop(job.id, None)
        if not self._since:
            self._tried = True
            self._backoff.reset()

    def release(self) -> list[Job]:
        """All of them, to be given back."""
        jobs, self._jobs = self.all(), {}
        self.forget(jobs)
        return jobs

    def given_up(self) -> bool:
        """Whether something has waited for longer than a worker that would end otherwise waits."""
        now = time.monotonic()
        return any(now - self._since[job_id] > self._longest_wait for job_id in self._jobs)


class PendingFollowUps:
    """Ended jobs of one worker whose follow-ups (rungs, rounds, comparison, alias) failed: they are tried again."""

    def __init__(self, timing: Timing) -> None:
        """None."""
        self._backoff = Backoff(timing.pause, timing.longest_pause, give_up_after=timing.upload)
        self.jobs: frozenset[int] = frozenset()
        """Their numbers."""

    @property
    def any(self) -> bool:
        """Whether follow-ups are pending."""
        return self._backoff.is_failing

    def add(self, jobs: Collection[int]) -> None:
        """A try failed; the next one comes after a pause, which is longer each time."""
        self._backoff.fail()
        self.jobs |= frozenset(jobs)

    def due(self) -> bool:
        """Whether it is time for another try."""
        return self.any and self._backoff.is_due

    def done(self) -> None:
        """A try succeeded."""
        self._backoff.reset()
        self.jobs = frozenset()

    def given_up(self) -> bool:
        """Whether they have been pending for longer than a worker that would end otherwise waits."""
        return self._backoff.is_exhausted


_LAST_TRY = 2
"""A job that has failed so often is tried alone: what kills its process must not end its mates."""
_AGAIN_S = 0.5


Note = Callable[[Job, str, str | None], None]
"""Writes into a job's log why an attempt went wrong, and the traceback or the last words that tell more."""


class Hands:
    """Does claimed jobs and finishes them."""

    def __init__(
        self,
        queue: JobStore,
        child: Conversation,
        heart: Heartbeat,
        uploads: Uploads,
        outages: Outages,
        results: Results,
        voice: Reporter,
        note: Note,
    ) -> None:
        """Nothing is in hand. All of these belong to the worker's loop; `note` writes into a job's log."""
        self._queue = queue
        self._child = child
        self._heart = heart
        self._uploads = uploads
        self._outages = outages
        self._results = results
        self._voice = voice
        self._note = note

    def do(self, what: str, claimed: list[Job]) -> Failure | None:
        """Give jobs to the child, and finish each as it comes back; why the rest of them broke, if it did."""
        unfinished = {job.token: job for job in claimed if job.token is not None}
        ended: list[tuple[Job, Result]] = []

        def on_event(message: Message) -> None:
            token = message["token"]
            match message["event"]:
                case "progress":
                    self._heart.note(token, message["values"])
                case "result":
                    result = self._results.read(token)
                    assert result is not None, f"the child told of a result of {token} that is not there"
                    job = unfinished.pop(token)
                    if result.outcome is Outcome.PREEMPTED and self._heart.holds(token):
                        # Back with the others of its pack: alone, another worker would claim it out of the pack.
                        ended.append((job, result))
                        return
                    if result.error is not None:
                        self._note(job, result.error, None)
                    self.finish(job, result)
                case "waiting":
                    self._uploads.add(unfinished.pop(token))
                    self._voice.warn(message["reason"])
                case other:
                    raise AssertionError(f"unknown event {other!r}")

        failure = None
        try:
            self._child.ask({"do": what, "jobs": [asdict(job) for job in claimed]}, on_event)
        except CommandFailedError as error:
            failure = error.failure
        for token, job in unfinished.items():
            # A child that died may have left the file without the word.
            result = self._results.read(token)
            if result is None and failure is not None:
                if not _is_interruption(failure):
                    self._note(job, failure.text.partition("\n")[0], failure.trace or failure.output)
                result = Result(token=token, outcome=Outcome(failure.outcome), error=_reason(failure))
            silent = Result(token=token, outcome=Outcome.FAILED, error="the worker said nothing of this job")
            ended.append((job, result or silent))
        self._finish_all(ended)
        return failure

    def without_suspects(self, claimed: list[Job]) -> list[Job]:
        """A job that may fail but once more is done alone; the others are given back."""
        suspects = [job for job in claimed if job.failures >= _LAST_TRY]
        if not suspects or len(claimed) == 1:
            return claimed
        return self.keep([suspects[0], *(job for job in claimed if job is not suspects[0])], 1)

    def keep(self, claimed: list[Job], count: int) -> list[Job]:
        """The first ones; the others go back to the queue as if they had not been claimed."""
        for job in claimed[count:]:
            assert job.token is not None
            self.finish(job, Result(token=job.token, outcome=Outcome.RETURNED))
        return claimed[:count]

    def finish(self, job: Job, result: Result) -> None:
        """Tell the queue, through an outage that is shorter than the lease."""
        wait = self._wait_after(result)

        def tell() -> Collection[str]:
            told = self._queue.finish(result.token, result.outcome, result=result.result, error=result.error, wait=wait)
            return [result.token] if told else []

        self._tell([(job, result)], tell)

    def _finish_all(self, ended: Sequence[tuple[Job, Result]]) -> None:
        """The same for several; those that have ended alike, and made nothing, end at one moment."""
        alike: dict[tuple[Outcome, str | None], list[tuple[Job, Result]]] = defaultdict(list)
        for job, result in ended:
            if result.result is None:
                alike[result.outcome, result.error].append((job, result))
            else:
                self.finish(job, result)
        for (outcome, error), pack in alike.items():
            tokens, wait = [result.token for _, result in pack], self._wait_after(pack[0][1])
            self._tell(pack, partial(self._queue.finish_together, tokens, outcome, error=error, wait=wait))

    def _tell(self, ended: Sequence[tuple[Job, Result]], tell: Callable[[], Collection[str]]) -> None:
        """Tell the queue until it answers with the tokens that still spoke for their jobs, or the leases are over."""
        while True:
            try:
                told = tell()
                break
            except JobStoreError as error:
                if not any(self._heart.confirmed(result.token) for _, result in ended):
                    for job, result in ended:
                        self._voice.warn(f"{job.title}: the queue was away for longer than the lease: {error}")
                        self._heart.release(result.token)
                    return
                time.sleep(_AGAIN_S)
        for job, result in ended:
            self._heart.release(result.token)
            self._results.remove(result.token)
            if result.token not in told:
                self._voice.warn(f"{job.title} was taken over by another worker; nothing of this attempt counts")
            elif result.outcome in (Outcome.FAILED, Outcome.FATAL):
                self._voice.fail(f"{job.title}{self._goes_on(job)}: {result.error}")

    def _goes_on(self, job: Job) -> str:
        """What becomes of a job that has failed, for a person who reads why."""
        try:
            after, time = self._queue.get(job.id), self._queue.time()
        except JobStoreError:
            return ""
        if after.state is JobState.QUEUED:
            return f", tried again in {max(0.0, after.not_before - time):.0f} s"
        return ", for good" if after.state is JobState.FAILED else ""

    def _wait_after(self, result: Result) -> float:
        """Seconds until a job that met an environment at fault may be claimed again; a person tries when they like."""
        met_outage = result.outcome is Outcome.PREEMPTED and result.error is not None
        return self._outages.first_wait if met_outage and not self._outages.fragile else 0.0


def _is_interruption(failure: Failure) -> bool:
    """Whether somebody has interrupted the work."""
    return failure.outcome == Outcome.PREEMPTED and not failure.environment


def _reason(failure: Failure) -> str | None:
    """What a job's row is told: nothing where a person has interrupted the work."""
    return None if _is_interruption(failure) else failure.text
