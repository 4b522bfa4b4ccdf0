"""Tells when a child has been silent for too long. Beating is not living: a hung step beats for ever."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Watchdog:
    """Knows the phase and the last sign of life."""

    def __init__(self, deadlines: Mapping[str, float]) -> None:
        """Watch with these longest silences, in seconds, by phase."""
        self._deadlines = deadlines
        self.phase = "start"
        self._heard = time.monotonic()

    def hear(self) -> None:
        """The child has said something."""
        self._heard = time.monotonic()

    def enter(self, phase: str) -> None:
        """The child begins something else."""
        self.phase = phase
        self.hear()

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._heard

    @property
    def limit(self) -> float:
        """The longest silence allowed now."""
        return self._deadlines.get(self.phase, max(self._deadlines.values()))

    @property
    def barks(self) -> bool:
        """Whether the child counts as hung."""
        return self.silence > self.limit
