"""Heartbeat, timing and stop request of a worker."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType, TracebackType
from typing import Any, Self

from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import Job, Worker
from rankwise.jobs.store import JobStore

DEADLINES: Mapping[str, float] = MappingProxyType(
    {
        "start": 600.0,
        "load": 3600.0,
        "tokenize": 3600.0,
        "train": 3600.0,
        "evaluate": 3600.0,
        "answer": 3600.0,
        "upload": 1800.0,
        "report": 1800.0,
    }
)
"""Seconds of silence after which a child counts as hung, by phase. Large, because quantizing a large base or a step
of a large model on a CPU sends no message for many minutes."""


def lease_clock() -> float:
    """Seconds on CLOCK_BOOTTIME, which all processes of a machine share.

    `time.monotonic()` pauses while the machine sleeps, so an expired claim would look valid afterwards.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The intervals and limits of a worker, in seconds.

    A claim without a heartbeat for `lease` goes to another worker. A worker that is to stop interrupts its child after
    `grace`. One that would otherwise end waits `upload` for an unavailable tracking server. Delays after outages grow
    from `pause` to `longest_pause`.
    """

    lease: float = 60.0
    beat: float = 10.0
    watch: float = 2.0
    announce: float = 30.0
    poll: float = 1.0
    reclaim: float = 5.0
    grace: float = 60.0
    upload: float = 600.0
    pause: float = 10.0
    longest_pause: float = 300.0
    deadlines: Mapping[str, float] = field(default_factory=lambda: DEADLINES)

    @classmethod
    def of_lease(cls, lease: float, *, grace: float = 60.0, patience: float | None = None) -> Self:
        """Intervals that fit six heartbeats into a lease. `patience` replaces all deadlines."""
        beat = min(10.0, lease / 6)
        return cls(
            lease=lease,
            beat=beat,
            watch=min(2.0, beat),
            announce=min(30.0, lease / 2),
            reclaim=min(5.0, lease / 2),
            grace=grace,
            deadlines=DEADLINES if patience is None else dict.fromkeys(DEADLINES, patience),
        )


logger = logging.getLogger(__name__)


class Heartbeat:
    """A thread that renews the leases of claimed jobs and announces the worker. A context manager.

    A database outage shorter than the lease has no effect. After a longer one another worker may own the jobs: until a
    heartbeat succeeds, `confirmed` is False and nothing may be published. `info` is shown in the list of workers.
    """

    def __init__(
        self, queue: JobStore, timing: Timing, worker: Worker, info: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        self._queue = queue
        self._timing = timing
        self._worker = worker
        self._info = info
        self._announced = float("-inf")
        self._jobs: dict[str, int] = {}
        self._until: dict[str, float] = {}
        self._progress: dict[str, Mapping[str, Any]] = {}
        self._unsent: set[str] = set()
        self._lost: set[str] = set()
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.changes = 0
        """Incremented when a claim is confirmed, lost or cancelled."""

    def hold(self, jobs: Collection[Job], since: float) -> None:
        """Renew the leases of jobs that were claimed at `since` (`lease_clock`) or later."""
        with self._lock:
            for job in jobs:
                assert job.token is not None
                self._jobs[job.token] = job.id
                self._until[job.token] = since + self._timing.lease
                if job.cancel_requested:
                    self._cancelled.add(job.token)
            self.changes += 1

    def release(self, token: str) -> None:
        """Stop renewing the lease of a finished or lost job."""
        with self._lock:
            for known in (self._jobs, self._until, self._progress):
                known.pop(token, None)
            for marked in (self._unsent, self._lost, self._cancelled):
                marked.discard(token)

    def holds(self, token: str) -> bool:
        """Whether no heartbeat has reported the claim as lost."""
        return token in self._jobs and token not in self._lost

    def confirmed(self, token: str) -> bool:
        """Whether the lease is known to be valid."""
        return self.holds(token) and lease_clock() < self._until[token]

    def cancelled(self, token: str) -> bool:
        """Whether a user cancelled the job."""
        return token in self._cancelled

    def add_progress(self, token: str, progress: Mapping[str, Any]) -> None:
        """Send a job's progress with the next heartbeat."""
        with self._lock:
            if token in self._jobs:
                self._progress[token] = {**self._progress.get(token, {}), **progress}
                self._unsent.add(token)

    def status_message(self) -> dict[str, Any]:
        """The `beat` command for the child: until when claims are confirmed, which are lost or cancelled."""
        with self._lock:
            return {
                "do": "beat",
                "until": dict(self._until),
                "lost": sorted(self._lost),
                "cancelled": sorted(self._cancelled),
            }

    def __enter__(self) -> Heartbeat:
        self._announce()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        try:
            self._queue.retire(self._worker)
        except JobStoreError as failure:
            logger.warning("this worker stays in the list of workers for a day: %s", failure)

    def _run(self) -> None:
        due = time.monotonic() + self._timing.beat
        while not self._end.wait(min(self._timing.watch, max(0.0, due - time.monotonic()))):
            try:
                if time.monotonic() >= due:
                    due = time.monotonic() + self._timing.beat
                    self._beat()
                else:
                    self._check_cancelled()
                if time.monotonic() - self._announced >= self._timing.announce:
                    self._announce()
            except JobStoreError as error:
                logger.warning("no heartbeat: %s", error)
            except Exception:
                # If this thread ended, every lease would expire while the work continues.
                logger.exception("no heartbeat")

    def _announce(self) -> None:
        self._announced = time.monotonic()
        self._queue.announce(self._worker, self._info())

    def _beat(self) -> None:
        with self._lock:
            tokens = [token for token in self._jobs if token not in self._lost]
            # Only what is new: the queue records the time of each progress.
            progress = {token: self._progress[token] for token in tokens if token in self._unsent}
        if not tokens:
            return
        # Read before the statement, so that the lease ends no earlier than computed.
        sent = lease_clock()
        beat = self._queue.beat(tokens, lease=self._timing.lease, progress=progress or None)
        with self._lock:
            for token in tokens:
                if token not in self._jobs:  # Released meanwhile.
                    continue
                if token in beat.held:
                    self._until[token] = sent + self._timing.lease
                else:
                    self._lost.add(token)
            self._unsent -= {
                token for token, sent_values in progress.items() if self._progress.get(token) is sent_values
            }
            self._cancelled |= beat.cancelled & self._jobs.keys()
            self.changes += 1

    def _check_cancelled(self) -> None:
        with self._lock:
            job_ids = dict(self._jobs)
        if not job_ids:
            return
        cancelled = {job.token for job in self._queue.jobs(ids=list(job_ids.values())) if job.cancel_requested}
        with self._lock:
            new = {token for token in job_ids if token in cancelled and token in self._jobs} - self._cancelled
            if new:
                self._cancelled |= new
                self.changes += 1


_STANDARD_STREAMS = (0, 1, 2)
_POLL_S = 0.1


class Stop:
    """A request to stop: the first lets the child write a checkpoint, the second interrupts it."""

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        self._on_first = on_first
        self.requested_at: float | None = None
        self.immediate = False
        self.followers: list[Stop] = []
        """Requested together with this one."""

    @property
    def requested(self) -> bool:
        """Whether the work is to end."""
        return self.requested_at is not None

    def request(self) -> None:
        """Request a stop, or an immediate one if already requested."""
        if self.requested_at is None:
            self.requested_at = time.monotonic()
            self._on_first()
        else:
            self.immediate = True
        for follower in self.followers:
            follower.request()

    def wait(self, seconds: float) -> None:
        """Return after so many seconds, or when a stop is requested."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and SIGHUP (unless ignored, as under `nohup`) into requests. Main thread only."""
        terminals = [descriptor for descriptor in _STANDARD_STREAMS if os.isatty(descriptor)]

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.request()

        def on_hangup(number: int, frame: FrameType | None) -> None:
            # Writing to a closed terminal would raise and end the work.
            devnull = os.open(os.devnull, os.O_RDWR)
            for descriptor in terminals:
                os.dup2(devnull, descriptor)
            os.close(devnull)
            # Both the shell and the kernel send SIGHUP.
            if not self.requested:
                self.request()

        handlers = {signal.SIGINT: on_signal, signal.SIGTERM: on_signal}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = on_hangup
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
