"""How long things may take, in seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

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
