"""What follows from ended jobs and met a tracking server or a disk that was away: tried again from time to time."""

from __future__ import annotations

import time
from collections.abc import Collection

from rankwise.worker.timing import Timing


class Owed:
    """The ended jobs of one worker whose consequences (rungs, rounds, comparison, alias) are not drawn yet."""

    def __init__(self, timing: Timing) -> None:
        """Nothing is owed."""
        self._timing = timing
        self._since: float | None = None
        self._next = 0.0
        self._pause = timing.pause
        self.jobs: frozenset[int] = frozenset()
        """Their numbers."""

    @property
    def any(self) -> bool:
        """Whether something is owed."""
        return self._since is not None

    def add(self, jobs: Collection[int]) -> None:
        """A try did not get through; the next one comes after a pause, which is longer each time."""
        now = time.monotonic()
        self._since = self._since or now
        self._next = now + self._pause
        self._pause = min(2 * self._pause, self._timing.longest_pause)
        self.jobs |= frozenset(jobs)

    def due(self) -> bool:
        """Whether it is time for another try."""
        return self.any and time.monotonic() >= self._next

    def paid(self) -> None:
        """A try got through."""
        self._since, self._pause, self.jobs = None, self._timing.pause, frozenset()

    def given_up(self) -> bool:
        """Whether it has been owed for longer than a worker that would end otherwise waits."""
        return self._since is not None and time.monotonic() - self._since > self._timing.upload
