"""Jobs that are computed and wait for the tracking server: held, beaten for, and tried again from time to time."""

from __future__ import annotations

import time
from collections.abc import Collection

from rankwise.jobs.job import Job
from rankwise.worker.timing import Timing


class Uploads:
    """The waiting jobs of one worker."""

    def __init__(self, timing: Timing) -> None:
        """Nothing waits."""
        self._timing = timing
        self._jobs: dict[int, Job] = {}
        self._since: dict[int, float] = {}
        self._next = 0.0
        self._pause = timing.pause

    @property
    def any(self) -> bool:
        """Whether something waits."""
        return bool(self._jobs)

    def all(self) -> list[Job]:
        """What waits."""
        return list(self._jobs.values())

    def add(self, job: Job) -> None:
        """A job's publication did not get through; the next try comes after a pause."""
        now = time.monotonic()
        self._jobs[job.id] = job
        self._since.setdefault(job.id, now)
        self._next = now + self._pause

    def take(self) -> list[Job]:
        """What is to be tried now, all of it over one base; the pause after another failure is longer."""
        if not self._jobs or time.monotonic() < self._next:
            return []
        self._pause = min(2 * self._pause, self._timing.longest_pause)
        first = next(iter(self._jobs.values()))
        jobs = [job for job in self._jobs.values() if job.pack_key == first.pack_key]
        for job in jobs:
            del self._jobs[job.id]
        return jobs

    def forget(self, jobs: Collection[Job]) -> None:
        """Published, or given back."""
        for job in jobs:
            if job.id not in self._jobs:
                self._since.pop(job.id, None)
        if not self._since:
            self._pause = self._timing.pause

    def release(self) -> list[Job]:
        """All of them, to be given back."""
        jobs, self._jobs = self.all(), {}
        self.forget(jobs)
        return jobs

    def given_up(self) -> bool:
        """Whether something has waited for longer than a worker that would end otherwise waits."""
        now = time.monotonic()
        return any(now - self._since[job_id] > self._timing.upload for job_id in self._jobs)
