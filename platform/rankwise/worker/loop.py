"""The worker's loop: claim a pack, have it done, tell the queue, until there is nothing left or a stop is asked for."""

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
from rankwise.jobs.job import Job, JobState, Outcome, Worker
from rankwise.jobs.store import JobStore
from rankwise.reporter import Reporter
from rankwise.worker.child import Child, CommandFailedError, Conversation, as_exception
from rankwise.worker.heartbeat import Heartbeat, Stop, Timing, lease_clock
from rankwise.worker.job_runner import Hands, Note, Outages, PendingFollowUps, Uploads
from rankwise.worker.protocol import Message, Result, Results

MAX_ARMS = 16
"""The most that is claimed together when nobody says otherwise; memory decides how many of them are started."""
_FORGOTTEN = 3
"""A worker that has left out so many announcements counts as gone where work is shared."""
_LOOKED_AT = 1000
"""Jobs that an idle worker looks at for decisions that nobody has made."""
_UNFINISHED = (JobState.QUEUED, JobState.RUNNING, JobState.UPLOADING)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a loop is to do.

    Attributes:
        among: Only these jobs; those that they lead to (a search's next arms) join them. None: all.
        drain: End when nothing is left to do.
        experiment: Only jobs of this experiment, beside a process that has one of its sweeps in hand.
        watched: The run of that sweep: it is finished by the process beside.
        max_arms: The most arms trained together.
        fragile: Whether an environment at fault (a full disk, a server that is away) ends the loop with that error; a
            worker that nobody watches waits and tries again.
    """

    among: frozenset[int] | None = None
    drain: bool = False
    experiment: str | None = None
    watched: str | None = None
    max_arms: int = MAX_ARMS
    fragile: bool = False


class WorkerLoop:
    """One worker: a heartbeat, a child, and the loop. A context manager."""

    def __init__(
        self,
        queue: JobStore,
        *,
        worker: Worker,
        spawn: Callable[[], Child],
        results: Results,
        voice: Reporter,
        stop: Stop,
        timing: Timing | None = None,
        info: dict[str, Any] | None = None,
        note: Note = lambda job, event, more: None,
    ) -> None:
        """Nothing is started yet.

        Args:
            queue: The truth about work.
            worker: Who this process is there.
            spawn: Starts a child.
            results: Where children put their results.
            voice: Tells people.
            stop: The wish to stop.
            timing: Leases, intervals, deadlines.
            info: What the worker says of itself in the queue.
            note: Writes into a job's log.
        """
        self._queue = queue
        self._worker = worker
        self._results = results
        self._voice = voice
        self._stop = stop
        self._timing = timing or Timing()
        self._info = {"state": "idle", **(info or {})}
        self._heart = Heartbeat(queue, self._timing, worker, lambda: {**self._info, "child": self._child.pid})
        self._uploads = Uploads(self._timing)
        self._outages = Outages(self._timing, voice)
        self._child = Conversation(spawn, voice=voice, heart=self._heart, timing=self._timing, stop=stop)
        self._hands = Hands(queue, self._child, self._heart, self._uploads, self._outages, results, voice, note)
        self._swept = float("-inf")
        self._settled = float("-inf")
        self._follow_ups = PendingFollowUps(self._timing)
        self._looked = False
        self._waiting_said = False
        self._among: set[int] | None = None
        self._unsettled = True
        self._finishes = True
        self._watched: str | None = None

    def __enter__(self) -> WorkerLoop:
        """Start the heartbeat."""
        self._results.sweep()
        self._heart.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child and the heartbeat."""
        try:
            self._child.__exit__(kind, error, trace)
        finally:
            self._heart.__exit__(kind, error, trace)

    def ask(self, command: Message, *, at_once: bool = True) -> dict[str, Any]:
        """Have the child do something that is no job.

        Raises:
            RankwiseError: What broke it, as the child raised it.
            KeyboardInterrupt: It was stopped.
        """
        try:
            return self._child.ask(command, at_once=at_once)
        except CommandFailedError as error:
            raise as_exception(error.failure) from None

    def work(self, plan: Plan) -> frozenset[int]:
        """Claim and do jobs until nothing is left, or a stop is asked for.

        Returns:
            The jobs of the plan, with those that joined them.

        Raises:
            RankwiseError: The environment is at fault, and the plan is fragile or was tried for long enough.
        """
        self._among = None if plan.among is None else set(plan.among)
        self._unsettled = True
        self._finishes = plan.among is None
        self._watched = plan.watched
        self._outages.fragile = plan.fragile
        try:
            while not self._stop.asked:
                try:
                    if not self._round(plan):
                        break
                except JobStoreError as error:
                    self._outages.wait(error, self._stop, passing=self._outages.passing())
        finally:
            self._let_go()
        return frozenset(self._among or ())

    def await_workers(self, count: int, timeout: float) -> bool:
        """Wait until so many workers are there, this one too; whether they are."""
        deadline = time.monotonic() + timeout
        while self._workers() < count:
            if self._stop.asked or time.monotonic() > deadline:
                return False
            self._stop.wait(self._timing.poll / 5)
        return True

    def failed(self, ids: Collection[int]) -> list[Job]:
        """Those of these jobs that have failed for good."""
        return [job for job in self._queue.jobs(ids=sorted(ids)) if job.state is JobState.FAILED]

    def _round(self, plan: Plan) -> bool:
        """One look at the queue; False when there is nothing left to do."""
        self._reclaim()
        since = lease_clock()
        claimed = self._queue.claim(
            self._worker,
            lease=self._timing.lease,
            max_arms=plan.max_arms,
            among=self._among,
            experiment=plan.experiment,
        )
        self._outages.over()
        if claimed:
            self._waiting_said = False
            self._do(claimed, since)
            return True
        if due := self._uploads.take():
            self._have_done("publish", due)
            self._uploads.forget(due)
            return True
        if self._follow_ups.due():
            self._settle([])
            return True
        if self._is_done(plan):
            return False
        self._stop.wait(self._timing.poll)
        return True

    def _share(self, claimed: list[Job]) -> list[Job]:
        """Leave to other workers their part of what waits, in place of taking all of it; a cut-off pack stays whole."""
        if len(claimed) == 1 or any(job.preemptions or job.lost or job.failures for job in claimed):
            return claimed
        try:
            count = self._workers()
            waiting = len(claimed) + self._queue.counts()[JobState.QUEUED]
        except JobStoreError as error:
            # They are in hand: an error of this look would leave them held, and done by nobody.
            logger.warning("nothing is left to other workers: %s", error)
            return claimed
        if count <= 1:
            return claimed
        return self._hands.keep(claimed, max(1, math.ceil(waiting / count)))

    def _workers(self) -> int:
        """How many workers there are, this one too."""
        there = [info for info in self._queue.workers() if info.silent < _FORGOTTEN * self._timing.announce]
        alive = set(psutil.pids())
        return sum(info.host != self._worker.host or info.pid in alive for info in there)

    def _do(self, claimed: list[Job], since: float) -> None:
        self._heart.hold(claimed, since)
        claimed = self._hands.without_suspects(self._share(claimed))
        self._have_done(str(claimed[0].kind), claimed)

    def _settle(self, claimed: list[Job]) -> None:
        """What follows from ended jobs: files to remove, arms to promote, prune or propose, a sweep to finish.

        Where the tracking server or a disk is away, it is pending, and tried again later. The first time also finishes
        sweeps that a worker which is gone has left so.
        """
        self._settled = time.monotonic()
        if self._stop.asked:
            return
        self._unsettled = True
        ids = sorted(self._follow_ups.jobs | {job.id for job in claimed})
        unended = bool(self._among) and bool(self._unfinished())
        command = {
            "do": "settle",
            "jobs": ids,
            "open": not self._looked,
            "complete": self._finishes,
            "watched": self._watched,
        }
        try:
            value = self._child.ask(command)
        except CommandFailedError as error:
            if not claimed:
                logger.warning("what follows from jobs %s is still to be done: %s", ids, error.failure.text)
            else:
                self._voice.warn(f"after {', '.join(job.title for job in claimed)}: {error.failure.text}")
            if error.failure.environment:
                self._follow_ups.add(ids)
            else:
                self._follow_ups.done()
            return
        self._looked = True
        self._follow_ups.done()
        if self._among is not None:
            new = set(value["submitted"]) - self._among
            self._among |= new
            self._unsettled = unended or bool(new)

    def _unfinished(self) -> list[Job]:
        """Those of the plan's jobs that have not ended."""
        return self._queue.jobs(ids=sorted(self._among or ()), states=_UNFINISHED)

    def _have_done(self, what: str, jobs: list[Job]) -> None:
        """Have the child work on jobs; then what follows from them, or what a failure means for the loop."""
        self._info["state"] = f"{what} of {len(jobs)}"
        failure = self._hands.do(what, jobs)
        self._info["state"] = "idle"
        if failure is None or not failure.environment:
            self._outages.well()
            if failure is not None and failure.trace is not None:
                self._voice.fail(failure.trace)
            self._settle(jobs)
            return
        if self._stop.asked:
            return
        error = as_exception(failure)
        assert isinstance(error, Exception)
        self._outages.wait(error, self._stop)

    def _reclaim(self) -> None:
        now = time.monotonic()
        if now - self._swept < self._timing.reclaim:
            return
        self._swept = now
        for job in self._queue.reclaim(host=self._worker.host, alive=psutil.pids()):
            logger.info("%s comes back from a worker that is gone", job.title)

    def _is_done(self, plan: Plan) -> bool:
        if self._uploads.any:
            if (plan.drain or self._among is not None) and self._uploads.given_up():
                names = ", ".join(job.title for job in self._uploads.all())
                raise TrackingError(
                    f"the tracking server has taken nothing for {self._timing.upload:,.0f} s: {names} are computed and "
                    "wait in the queue; the next worker of this home publishes them without training"
                )
            return False
        if self._among is not None:
            left = self._unfinished()
        elif plan.drain:
            left = self._queue.jobs(states=_UNFINISHED, experiment=plan.experiment, limit=100)
        else:
            if self._queue.held():
                self._decides_for_the_dead(self._queue.jobs(states=[JobState.QUEUED], limit=_LOOKED_AT))
            return False
        if not left and self._among is None and self._follow_ups.any:
            if self._follow_ups.given_up():
                raise TrackingError(
                    f"the tracking server has taken nothing for {self._timing.upload:,.0f} s: every job has ended, but "
                    "sweeps lack their comparison and their alias; `rankwise sync` makes up for it"
                )
            return False
        if not left:
            # Another worker may have ended one of these jobs since, and what follows from that is not known here.
            return self._among is None or not self._unsettled or not self._leads_on()
        if not self._decides_for_the_dead(left) and not self._waiting_said:
            self._waiting_said = True
            self._voice.say(f"waiting: {len(left)} jobs are held by another worker or wait for another try")
        return False

    def _leads_on(self) -> bool:
        """Whether more jobs follow from those of the plan than was known."""
        before = set(self._among or ())
        self._settle(self._queue.jobs(ids=sorted(before)))
        return self._among is not None and self._among != before

    def _decides_for_the_dead(self, left: list[Job]) -> bool:
        """Settle what is held while nothing moves: whoever ended the last of the mates has died before it decided."""
        held = [job for job in left if job.held]
        waits = all(job.state is JobState.QUEUED for job in left)
        if not held or not waits or time.monotonic() - self._settled <= self._timing.reclaim:
            return False
        self._settle(held)
        return True

    def _let_go(self) -> None:
        """Give back what waits for the tracking server: whoever claims it publishes it without training."""
        for job in self._uploads.release():
            assert job.token is not None
            self._hands.finish(job, Result(token=job.token, outcome=Outcome.PREEMPTED))
