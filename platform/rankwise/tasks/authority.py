"""Which claims this process may still speak for. The parent beats, and passes on what the queue says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping

from rankwise.exceptions import JobStoreError
from rankwise.jobs.store import JobStore
from rankwise.worker.timing import lease_clock

_AGAIN_S = 0.5


class Authority:
    """What is known of the claims. Thread-safe.

    Time is that of `lease_clock`, in which a process that was stopped (SIGSTOP) or a machine that slept has aged: after
    that a claim counts as unconfirmed until the parent says otherwise.
    """

    def __init__(self) -> None:
        """No claims."""
        self._until: dict[str, float] = {}
        self._lost: frozenset[str] = frozenset()
        self._cancelled: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def update(self, until: Mapping[str, float], lost: Collection[str], cancelled: Collection[str]) -> None:
        """Take over what the parent knows."""
        with self._lock:
            self._until = dict(until)
            self._lost = frozenset(lost)
            self._cancelled = frozenset(cancelled)

    def holds(self, token: str) -> bool:
        """Whether nobody has said that the claim is lost."""
        return token in self._until and token not in self._lost

    def confirmed(self, token: str) -> bool:
        """Whether the lease still runs, as far as this process knows."""
        return self.holds(token) and lease_clock() < self._until[token]

    def cancelled(self, token: str) -> bool:
        """Whether a person wants the job stopped."""
        return token in self._cancelled

    def check(self, token: str, queue: JobStore) -> bool:
        """Ask the queue, before anything is written that others can see; a no is remembered.

        An outage of the queue's database is waited for while the lease lasts.
        """
        if self.patiently(token, lambda: queue.holds(token)):
            return True
        with self._lock:
            self._lost |= {token}
        return False

    def patiently(self, token: str, ask: Callable[[], bool]) -> bool:
        """The queue's answer for a claim; False where the claim is lost, or the queue away for as long as it lasts."""
        while self.holds(token):
            try:
                return ask()
            except JobStoreError:
                if not self.confirmed(token):
                    return False
                time.sleep(_AGAIN_S)
        return False
