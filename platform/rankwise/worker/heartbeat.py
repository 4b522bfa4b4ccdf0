"""Keeps a worker's claims alive while its child computes, and tells which are lost and which a person wants stopped.

It also announces the worker, so that people see who is there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import Job, Worker
from rankwise.jobs.store import JobStore
from rankwise.worker.timing import Timing, lease_clock

logger = logging.getLogger(__name__)


class Heartbeat:
    """A thread that renews leases. A context manager.

    An outage of the database shorter than the lease changes nothing. After a longer one, `confirmed` says that nothing
    may be published: another worker may have taken over; the first beat that gets through tells.
    """

    def __init__(
        self, queue: JobStore, timing: Timing, worker: Worker, info: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        """Beat for nothing yet; `info` is what the worker says of itself."""
        self._queue = queue
        self._timing = timing
        self._worker = worker
        self._info = info
        self._announced = float("-inf")
        self._jobs: dict[str, int] = {}
        self._until: dict[str, float] = {}
        self._progress: dict[str, Mapping[str, Any]] = {}
        self._untold: set[str] = set()
        self._lost: set[str] = set()
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.changes = 0
        """Grows whenever a claim was confirmed, lost or cancelled."""

    def hold(self, jobs: Collection[Job], since: float) -> None:
        """Beat for claimed jobs, whose leases began at `since` (by `lease_clock`) or later."""
        with self._lock:
            for job in jobs:
                assert job.token is not None
                self._jobs[job.token] = job.id
                self._until[job.token] = since + self._timing.lease
                if job.cancel_requested:
                    self._cancelled.add(job.token)
            self.changes += 1

    def release(self, token: str) -> None:
        """Stop beating for a job that has been finished, or is lost."""
        with self._lock:
            for known in (self._jobs, self._until, self._progress):
                known.pop(token, None)
            for marked in (self._untold, self._lost, self._cancelled):
                marked.discard(token)

    def holds(self, token: str) -> bool:
        """Whether no heartbeat has said that the claim is lost."""
        return token in self._jobs and token not in self._lost

    def confirmed(self, token: str) -> bool:
        """Whether the lease still runs, as far as this process knows."""
        return self.holds(token) and lease_clock() < self._until[token]

    def cancelled(self, token: str) -> bool:
        """Whether a person wants the job stopped."""
        return token in self._cancelled

    def note(self, token: str, progress: Mapping[str, Any]) -> None:
        """How far a job is, for the next beat."""
        with self._lock:
            if token in self._jobs:
                self._progress[token] = {**self._progress.get(token, {}), **progress}
                self._untold.add(token)

    def news(self) -> dict[str, Any]:
        """What the child must know: until when claims are confirmed, and which are lost or cancelled."""
        with self._lock:
            return {
                "do": "beat",
                "until": dict(self._until),
                "lost": sorted(self._lost),
                "cancelled": sorted(self._cancelled),
            }

    def __enter__(self) -> Heartbeat:
        """Announce the worker, and start.

        Raises:
            JobStoreError: The queue's database does not answer.
        """
        self._announce()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and say that the worker has ended."""
        self._end.set()
        self._thread.join()
        try:
            self._queue.retire(self._worker)
        except JobStoreError as failure:
            logger.warning("this worker stays listed for a day: %s", failure)

    def _run(self) -> None:
        due = time.monotonic() + self._timing.beat
        while not self._end.wait(min(self._timing.watch, max(0.0, due - time.monotonic()))):
            try:
                if time.monotonic() >= due:
                    due = time.monotonic() + self._timing.beat
                    self._beat()
                else:
                    self._watch()
                if time.monotonic() - self._announced >= self._timing.announce:
                    self._announce()
            except JobStoreError as error:
                logger.warning("no heartbeat: %s", error)
            except Exception:
                # A thread that ends here would let every lease run out while the work goes on.
                logger.exception("no heartbeat")

    def _announce(self) -> None:
        self._announced = time.monotonic()
        self._queue.announce(self._worker, self._info())

    def _beat(self) -> None:
        with self._lock:
            asked = [token for token in self._jobs if token not in self._lost]
            # Only what is new: the queue notes when a job was heard of last.
            progress = {token: self._progress[token] for token in asked if token in self._untold}
        if not asked:
            return
        # By the clock before the statement: the lease began at some moment after it.
        sent = lease_clock()
        beat = self._queue.beat(asked, lease=self._timing.lease, progress=progress or None)
        with self._lock:
            for token in asked:
                if token not in self._jobs:  # Released in the meantime.
                    continue
                if token in beat.held:
                    self._until[token] = sent + self._timing.lease
                else:
                    self._lost.add(token)
            self._untold -= {token for token, told in progress.items() if self._progress.get(token) is told}
            self._cancelled |= beat.cancelled & self._jobs.keys()
            self.changes += 1

    def _watch(self) -> None:
        """Look for wishes to cancel between two heartbeats, without writing."""
        with self._lock:
            asked = dict(self._jobs)
        if not asked:
            return
        found = {job.token for job in self._queue.jobs(ids=list(asked.values())) if job.cancel_requested}
        with self._lock:
            new = {token for token in asked if token in found and token in self._jobs} - self._cancelled
            if new:
                self._cancelled |= new
                self.changes += 1
