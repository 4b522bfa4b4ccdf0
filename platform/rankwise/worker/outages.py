"""An environment at fault: a full disk, a server or a database that is away. It is no job's fault; waiting helps."""

from __future__ import annotations

import time

from rankwise.worker.stopping import Stop
from rankwise.worker.timing import Timing
from rankwise.worker.voice import Voice


class Outages:
    """Counts them, and waits longer each time."""

    def __init__(self, timing: Timing, voice: Voice) -> None:
        """All is well."""
        self._timing = timing
        self._voice = voice
        self._pause = 0.0
        self._since: float | None = None
        self.fragile = False
        """Whether an outage ends the loop: somebody watches, and would rather know."""

    @property
    def first_wait(self) -> float:
        """Seconds after which a job that met an outage may be claimed again."""
        return max(self._timing.pause, self._pause)

    def passing(self) -> bool:
        """Whether the queue has been away for less than a lease, for which also one who watches waits."""
        if self._since is None:
            self._since = time.monotonic()
        return time.monotonic() - self._since < self._timing.lease

    def over(self) -> None:
        """The queue answers."""
        self._since = None

    def well(self) -> None:
        """A pack went through."""
        self._pause = 0.0

    def wait(self, error: Exception, stop: Stop, *, passing: bool = False) -> None:
        """Wait, longer than the last time, or until a stop is asked for.

        Raises:
            Exception: `error`, where the loop is fragile and the outage is not a passing one.
        """
        if self.fragile and not passing:
            raise error
        self._pause = min(max(self._timing.pause, 2 * self._pause), self._timing.longest_pause)
        self._voice.warn(f"{error}; trying again in {self._pause:,.0f} s")
        deadline = time.monotonic() + self._pause
        while not stop.asked and time.monotonic() < deadline:
            time.sleep(0.1)
