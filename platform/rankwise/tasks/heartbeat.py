"""Keeps a worker's claims alive while it computes, and tells which it has lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from types import TracebackType

from rankwise.exceptions import JobError
from rankwise.jobs.store import JobStore

LEASE_S = 60.0
INTERVAL_S = 10.0
logger = logging.getLogger(__name__)


class Heartbeat:
    """A thread that renews leases. A context manager.

    An outage of the database shorter than the lease changes nothing; after a longer one the claims are lost, and
    `holds` says so.
    """

    def __init__(self, queue: JobStore, tokens: Collection[str], interval: float = INTERVAL_S) -> None:
        """Beat for these tokens every `interval` seconds."""
        self._queue = queue
        self._interval = interval
        self._held = frozenset(tokens)
        self._cancelled: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def holds(self, token: str) -> bool:
        """Whether the last heartbeat found the token to speak for its job."""
        return token in self._held

    def cancelled(self, token: str) -> bool:
        """Whether a person wants the job stopped."""
        return token in self._cancelled

    def release(self, token: str) -> None:
        """Stop beating for a job that has been finished."""
        with self._lock:
            self._held -= {token}

    def __enter__(self) -> Heartbeat:
        """Start."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._end.wait(self._interval):
            asked = self._held
            try:
                beat = self._queue.beat(asked, lease=LEASE_S)
            except JobError as error:
                logger.warning("no heartbeat: %s", error)
                continue
            with self._lock:
                # Only what was asked for: `release` may have taken one away in the meantime.
                self._held -= asked - beat.held
                self._cancelled = beat.cancelled
