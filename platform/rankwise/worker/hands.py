"""Jobs in a worker's hands: given to the child, and told to the queue as they end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial

from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import Job, JobState, Outcome
from rankwise.jobs.store import JobStore
from rankwise.worker.conversation import CommandFailedError, Conversation
from rankwise.worker.heartbeat import Heartbeat
from rankwise.worker.outages import Outages
from rankwise.worker.protocol import Failure, Message
from rankwise.worker.results import Result, Results
from rankwise.worker.uploads import Uploads
from rankwise.worker.voice import Voice

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
        voice: Voice,
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
