"""Exponential backoff: the delay between retries, up to a limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


def delay_after(failures: int, *, first: float, longest: float, factor: float = 2.0) -> float:
    """Seconds to wait after a number of consecutive failures (1 or more)."""
    delay = first
    for _ in range(failures - 1):
        if delay >= longest:
            break
        delay *= factor
    return min(delay, longest)


class Backoff:
    """The delay before the next retry of something, and how long it has been failing.

    The delay grows from `first` to `longest` seconds by `factor`. `is_exhausted` after `give_up_after` seconds of
    failure.
    """

    def __init__(
        self,
        first: float,
        longest: float,
        *,
        factor: float = 2.0,
        give_up_after: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first = first
        self._longest = longest
        self._factor = factor
        self._give_up_after = give_up_after
        self._clock = clock
        self._failures = 0
        self._since: float | None = None
        self._next = -math.inf

    @property
    def delay(self) -> float:
        """Seconds between the last failure and the next retry; 0 if nothing fails."""
        if not self._failures:
            return 0.0
        return delay_after(self._failures, first=self._first, longest=self._longest, factor=self._factor)

    @property
    def is_failing(self) -> bool:
        """Whether the last try failed."""
        return self._since is not None

    @property
    def is_due(self) -> bool:
        """Whether the delay is over."""
        return self._clock() >= self._next

    @property
    def is_exhausted(self) -> bool:
        """Whether it has been failing for longer than `give_up_after`."""
        return self._since is not None and self._clock() - self._since > self._give_up_after

    def fail(self) -> float:
        """Count a failure and return the delay."""
        self._failures += 1
        if self._since is None:
            self._since = self._clock()
        self.restart()
        return self.delay

    def restart(self) -> None:
        """Start the current delay again."""
        self._next = self._clock() + self.delay

    def reset(self) -> None:
        """Count a success."""
        self._failures, self._since, self._next = 0, None, -math.inf
