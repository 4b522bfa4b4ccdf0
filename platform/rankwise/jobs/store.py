"""The contract of a job store. One test suite (`tests/helpers/job_store_contract.py`) runs on every implementation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from rankwise.jobs.job import Attempt, Beat, Job, JobKind, JobState, NewJob, Outcome, Worker, WorkerInfo


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
            jobs: What to add. `after` holds ids of jobs that must have succeeded first; it counts for jobs that are
                queued, and one that waits for a job that has failed or was cancelled is cancelled at once.
            again: Put a failed or cancelled job back into the queue, with the spec given and its counts at zero.

        Returns:
            The jobs as they now stand, in the order given.

        Raises:
            JobError: Jobs would wait for themselves; none is added then.
        """

    def claim(
        self,
        worker: Worker,
        *,
        lease: float,
        max_arms: int = 1,
        kinds: Collection[JobKind] | None = None,
        among: Collection[int] | None = None,
        experiment: str | None = None,
    ) -> list[Job]:
        """Take the first eligible job and up to `max_arms - 1` more of its pack; empty when there is none now.

        Eligible: queued, not held, due, all that it comes after succeeded. Mates have the same `pack_key`
        and the same `pack_id`: jobs that were a pack are claimed again as that pack.

        Args:
            worker: Who claims.
            lease: Seconds until the claim is lost without a heartbeat.
            max_arms: The largest pack.
            kinds: Only these kinds.
            among: Only these ids.
            experiment: Only jobs of this experiment.
        """

    def beat(
        self, tokens: Collection[str], *, lease: float, progress: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Beat:
        """Renew the leases and note progress.

        Args:
            tokens: Of the attempts under way.
            lease: Seconds until the claims are lost without another heartbeat.
            progress: What to note, by token. An integer `checkpoint`, the step that was kept last, above all that the
                job has reported before sets its count of lost workers back to zero.
        """

    def set_run(self, token: str, run_id: str) -> bool:
        """Note the MLflow run of the job."""

    def assign_run(self, job_id: int, run_id: str) -> bool:
        """Note the MLflow run of a job that has none yet, whoever holds it; `False` when it has one."""

    def holds(self, token: str) -> bool:
        """Whether the token still speaks for its job: the check before every external write."""

    def uploading(self, token: str, result: Mapping[str, Any]) -> bool:
        """Note that the work is computed and waits for publication."""

    def finish(
        self,
        token: str,
        outcome: Outcome,
        *,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
        wait: float = 0.0,
    ) -> bool:
        """End the attempt and move the job on, as the outcome says.

        A job that goes back to the queue is cancelled instead when a person asked for that. What waits for a job that
        ends failed or cancelled is cancelled with it. Saying the same outcome once more changes nothing and is `True`,
        so that a caller may repeat the call when its answer got lost.

        Args:
            token: Of the attempt.
            outcome: How it ended.
            result: What the job has made; the earlier one stays when none is given.
            error: Why it did not succeed.
            wait: Seconds before it may be claimed again, where it goes back to the queue; after a failure at least the
                backoff.
        """

    def finish_together(
        self, tokens: Collection[str], outcome: Outcome, *, error: str | None = None, wait: float = 0.0
    ) -> frozenset[str]:
        """End several attempts as `finish` does, at one moment: a pack that goes back to the queue goes back whole.

        Returns:
            Those tokens for which `finish` would have said yes.
        """

    def reclaim(self, *, host: str | None = None, alive: Collection[int] = ()) -> list[Job]:
        """Put jobs back whose lease ran out, and those held on `host` by a process that is not among `alive`."""

    def cancel(self, ids: Collection[int]) -> list[Job]:
        """Cancel what is queued at once, and what waits for it; ask what is running to stop. Returns those named."""

    def retry(self, ids: Collection[int]) -> list[Job]:
        """Put failed and cancelled jobs back into the queue, counts at zero, and what was cancelled because of them.

        Returns:
            Those named and those that came back with them, as they now stand. One that waits for a job that has failed
            or was cancelled, and is not named, is still cancelled.
        """

    def settle(self, promote: Collection[int], prune: Mapping[int, str]) -> list[Job]:
        """Decide how held jobs go on, all in one transaction; rows that are not held any more are left alone.

        Args:
            promote: These may be claimed again.
            prune: These are cancelled, with the reason as their error.

        Returns:
            Those that changed.

        Raises:
            ValueError: A job is in both.
        """

    def get(self, job_id: int) -> Job:
        """One job. Raises `JobError` when there is none."""

    def find(self, kind: JobKind, spec_hashes: Collection[str]) -> dict[str, Job]:
        """The jobs of a kind with these spec hashes, by spec hash."""

    def jobs(
        self,
        *,
        ids: Collection[int] | None = None,
        kinds: Collection[JobKind] | None = None,
        experiment: str | None = None,
        states: Collection[JobState] | None = None,
        limit: int | None = None,
        after_id: int = 0,
    ) -> list[Job]:
        """A page of jobs by id. Without a limit: all that `ids` names, or the first 1,000."""

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""

    def depth(self, experiment: str | None = None) -> dict[tuple[JobKind, JobState], int]:
        """How many jobs there are of each kind in each state."""

    def held(self, experiment: str | None = None) -> int:
        """How many queued jobs are held until `settle`."""

    def waits_for(self, job_id: int) -> list[Job]:
        """The jobs that must succeed before this one may be claimed, so far as they have not."""

    def time(self) -> float:
        """Seconds since the epoch, by the database's clock."""

    def attempts(self, job_id: int) -> list[Attempt]:
        """All attempts of a job, the first one first."""

    def open_attempts(self) -> list[Attempt]:
        """All attempts that have not ended."""

    def recent(self, kind: JobKind, limit: int = 50) -> list[Attempt]:
        """The attempts of this kind that succeeded last, the newest first."""

    def announce(self, worker: Worker, info: Mapping[str, Any]) -> None:
        """Say that a worker is there, and what it is like; again and again, so that its silence shows."""

    def retire(self, worker: Worker) -> None:
        """Say that a worker has ended."""

    def workers(self) -> list[WorkerInfo]:
        """Workers that have announced themselves and not retired, those silent for a day left out."""
