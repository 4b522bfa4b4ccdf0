"""Keeps a worker's claims alive while its child computes, and tells which are lost and which a person wants stopped.

It also announces the worker, so that people see who is there.

The end of the terminal (SIGHUP) asks for a checkpoint too, however often it is told.

- How long things may take, in seconds.
- The wish to stop: the first SIGINT or SIGTERM asks for a checkpoint, the second one ends the work at once.
"""

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
"""Silence after which a child counts as hung, by phase. Downloads, tokenizing and steps tell of themselves; quantizing
a large base and a step of a large model on a CPU do not for many minutes, hence the large numbers."""


def lease_clock() -> float:
    """Seconds on a clock that all processes of a machine share, and that goes on while the machine sleeps.

    `time.monotonic()` stands still then, and a claim that others have taken over would look as if it still stood.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A worker's times.

    Attributes:
        lease: A claim without a heartbeat for so long goes to another worker.
        beat: Between two heartbeats.
        watch: Between two looks for cancelled jobs.
        announce: Between two announcements of the worker.
        poll: Between two looks for work.
        reclaim: Between two looks for dead workers.
        grace: From the wish to stop until the child is ended, whatever it does.
        upload: How long a worker that is to end waits for the tracking server to take what is computed.
        pause: First pause after the environment was at fault; doubled each time up to `longest_pause`.
        longest_pause: See `pause`.
        deadlines: By phase, see `DEADLINES`.
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
        """The times that go with a lease: six heartbeats fit into it.

        Args:
            lease: Seconds.
            grace: Seconds.
            patience: In place of all deadlines.
        """
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


_STANDARD = (0, 1, 2)
_POLL_S = 0.1


class Stop:
    """What the signals have said so far."""

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        """Nothing was asked for yet; `on_first` is called at the first wish."""
        self._on_first = on_first
        self.since: float | None = None
        self.now = False
        self.followers: list[Stop] = []
        """Asked whenever this one is."""

    @property
    def asked(self) -> bool:
        """Whether the work is to end."""
        return self.since is not None

    def ask(self) -> None:
        """Wish it once, or once more."""
        if self.since is None:
            self.since = time.monotonic()
            self._on_first()
        else:
            self.now = True
        for follower in self.followers:
            follower.ask()

    def wait(self, seconds: float) -> None:
        """Return after so many seconds, or when a stop is requested."""
        deadline = time.monotonic() + seconds
        while not self.asked and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGHUP (unless `nohup` has it ignored) for wishes while the block runs.

        Only in a main thread.
        """
        terminals = [descriptor for descriptor in _STANDARD if os.isatty(descriptor)]

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.ask()

        def on_hangup(number: int, frame: FrameType | None) -> None:
            # What is still said to a terminal that is gone would be an error, and end the work.
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
            # The shell and the kernel both tell.
            if not self.asked:
                self.ask()

        handlers = {signal.SIGINT: on_signal, signal.SIGTERM: on_signal}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = on_hangup
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
