"""The contract of a job store. One test suite (`tests/unit/jobs/contract.py`) runs on every implementation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from rankwise.jobs.job import Beat, Job, JobKind, JobState, NewJob, Outcome, Worker


class JobStore(Protocol):
    """The truth about work. Safe to use from several threads and processes at once.

    Every transition is decided by one statement whose predicate names the state and, for whoever speaks for a job, its
    token. A method that takes a token answers whether the token still spoke for the job; `False` means that authority
    is lost: publish nothing of it. All times are the database's.

    Raises:
        JobStoreError: The database cannot be reached, is locked for too long, or has another schema.
    """

    def submit(self, jobs: Sequence[NewJob], *, again: bool = False) -> list[Job]:
        """Add jobs; one that exists (same kind and spec hash) is left as it is.

        Args:
            jobs: What to add. `after` holds ids of jobs that must have succeeded first.
            again: Put a failed or cancelled job back into the queue, with the spec given and its counts at zero.

        Returns:
            The jobs as they now stand, in the order given.
        """

    def claim(
        self,
        worker: Worker,
        *,
        lease: float,
        max_arms: int = 1,
        kinds: Collection[JobKind] | None = None,
        among: Collection[int] | None = None,
    ) -> list[Job]:
        """Take the first eligible job and up to `max_arms - 1` more of its pack; empty when there is none now.

        Eligible: queued, due, not to be cancelled, all that it comes after succeeded. Mates have the same `pack_key`
        and the same `pack_id`: jobs that were a pack are claimed again as that pack.

        Args:
            worker: Who claims.
            lease: Seconds until the claim is lost without a heartbeat.
            max_arms: The largest pack.
            kinds: Only these kinds.
            among: Only these ids.
        """

    def beat(self, tokens: Collection[str], *, lease: float, progress: Mapping[str, Any] | None = None) -> Beat:
        """Renew the leases and note progress."""

    def set_run(self, token: str, run_id: str) -> bool:
        """Note the MLflow run of the job."""

    def holds(self, token: str) -> bool:
        """Whether the token still speaks for its job: the check before every external write."""

    def uploading(self, token: str, result: Mapping[str, Any]) -> bool:
        """Note that the work is computed and waits for publication."""

    def finish(
        self, token: str, outcome: Outcome, *, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> bool:
        """End the attempt and move the job on, as the outcome says."""

    def reclaim(self, *, host: str | None = None, alive: Collection[int] = ()) -> list[Job]:
        """Put jobs back whose lease ran out, and those held on `host` by a process that is not among `alive`."""

    def cancel(self, ids: Collection[int]) -> list[Job]:
        """Cancel what is queued at once; ask what is running to stop."""

    def get(self, job_id: int) -> Job:
        """One job. Raises `JobError` when there is none."""

    def find(self, kind: JobKind, spec_hashes: Collection[str]) -> dict[str, Job]:
        """The jobs of a kind with these spec hashes, by spec hash."""

    def jobs(
        self,
        *,
        experiment: str | None = None,
        states: Collection[JobState] | None = None,
        limit: int = 1000,
        after_id: int = 0,
    ) -> list[Job]:
        """A page of jobs by id."""

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
