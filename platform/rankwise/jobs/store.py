"""The job store on SQLite and PostgreSQL. One test suite (`tests/helpers/job_store_contract.py`) runs on both.

Each method is one transaction; the statements are in `submission`, `transitions` and `queries`. Each transition is
decided by one UPDATE whose predicate names state and token; what follows from it is in the same transaction. PostgreSQL
locks the first eligible job with `FOR UPDATE SKIP LOCKED`, so that claimers do not wait for one another; SQLite has one
writer at a time (`BEGIN IMMEDIATE`), so the same statements need no lock there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from rankwise.jobs import queries, submission, transitions
from rankwise.jobs.aliases import AliasHistory
from rankwise.jobs.database import database_errors, open_engine, upgrade
from rankwise.jobs.job import (
    Attempt,
    HeartbeatReply,
    Job,
    JobKind,
    JobState,
    Limits,
    NewJob,
    Outcome,
    Worker,
    WorkerInfo,
)
from rankwise.redact import redact

T = TypeVar("T")
_DEADLOCK, _SERIALIZATION = "40P01", "40001"
_TRIES = 5


class JobStore:
    """The truth about work. Safe to use from several threads and processes at once.

    Every transition is decided by one statement whose predicate names the state and, for whoever speaks for a job, its
    token. A method that takes a token answers whether the token still spoke for the job; `False` means that authority
    is lost: publish nothing of it. All times are the database's.

    Raises:
        JobStoreError: The database cannot be reached, is locked for too long, or has another schema.
    """

    def __init__(self, url: str, *, lock: Path, limits: Limits | None = None) -> None:
        """Open the database and bring its schema up to date.

        Args:
            url: SQLAlchemy URL of SQLite or PostgreSQL.
            lock: File that serialises migrations.
            limits: How often a job is tried.

        Raises:
            JobError: The database cannot be reached, or a newer release wrote it.
        """
        self._engine = open_engine(url)
        self._reader = self._engine.execution_options(rankwise_read_only=True)
        self._limits = limits or Limits()
        upgrade(self._engine, lock)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @property
    def aliases(self) -> AliasHistory:
        """The moves of aliases, which are in the same database."""
        return AliasHistory(self._engine, self._reader)

    def _write(self, doing: str, work: Callable[[Connection], T]) -> T:
        """Run `work` in a writing transaction. PostgreSQL may choose it as the victim of a deadlock: then once more."""
        with database_errors(doing):
            for left in reversed(range(_TRIES)):
                try:
                    with self._engine.begin() as connection:
                        return work(connection)
                except DBAPIError as error:
                    if left == 0 or getattr(error.orig, "sqlstate", None) not in {_DEADLOCK, _SERIALIZATION}:
                        raise
            raise AssertionError("the last try returns or raises")

    def _read(self, doing: str, work: Callable[[Connection], T]) -> T:
        with database_errors(doing), self._reader.begin() as connection:
            return work(connection)

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
        return self._write("submitting jobs", lambda connection: submission.submit(connection, jobs, again=again))

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
        return self._write(
            "claiming a pack",
            lambda connection: transitions.claim(
                connection, worker, lease=lease, max_arms=max_arms, kinds=kinds, among=among, experiment=experiment
            ),
        )

    def beat(
        self, tokens: Collection[str], *, lease: float, progress: Mapping[str, Mapping[str, Any]] | None = None
    ) -> HeartbeatReply:
        """Renew the leases and note progress.

        Args:
            tokens: Of the attempts under way.
            lease: Seconds until the claims are lost without another heartbeat.
            progress: What to note, by token. An integer `checkpoint`, the step that was kept last, above all that the
                job has reported before sets its count of lost workers back to zero.
        """
        return self._write(
            "sending a heartbeat",
            lambda connection: transitions.beat(connection, tokens, lease=lease, progress=progress or {}),
        )

    def set_run(self, token: str, run_id: str) -> bool:
        """Note the MLflow run of the job."""
        return self._write(
            "noting a run", lambda connection: transitions.change(connection, token, mlflow_run_id=run_id)
        )

    def assign_run(self, job_id: int, run_id: str) -> bool:
        """Note the MLflow run of a job that has none yet, whoever holds it; `False` when it has one."""
        return self._write("noting a run", lambda connection: transitions.assign_run(connection, job_id, run_id))

    def uploading(self, token: str, result: Mapping[str, Any]) -> bool:
        """Note that the work is computed and waits for publication."""
        values = {"state": str(JobState.UPLOADING), "result": dict(result)}
        return self._write("noting a result", lambda connection: transitions.change(connection, token, **values))

    def holds(self, token: str) -> bool:
        """Whether the token still speaks for its job: the check before every external write."""
        return self._read("checking a token", lambda connection: queries.holds(connection, token))

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
            error: Why it did not succeed; secrets in it are not stored.
            wait: Seconds before it may be claimed again, where it goes back to the queue; after a failure at least the
                backoff.
        """
        said = None if error is None else _storable(error)
        return self._write(
            "finishing a job",
            lambda connection: transitions.finish(
                connection, token, outcome, self._limits, result=result, error=said, wait=wait
            ),
        )

    def finish_together(
        self, tokens: Collection[str], outcome: Outcome, *, error: str | None = None, wait: float = 0.0
    ) -> frozenset[str]:
        """End several attempts as `finish` does, at one moment: a pack that goes back to the queue goes back whole.

        Returns:
            Those tokens for which `finish` would have said yes.
        """
        said = None if error is None else _storable(error)
        return self._write(
            "finishing jobs",
            lambda connection: transitions.finish_together(
                connection, tokens, outcome, self._limits, error=said, wait=wait
            ),
        )

    def reclaim(self, *, host: str | None = None, alive: Collection[int] = ()) -> list[Job]:
        """Put jobs back whose lease ran out, and those held on `host` by a process that is not among `alive`."""
        return self._write(
            "reclaiming jobs",
            lambda connection: transitions.reclaim(connection, self._limits, host=host, alive=alive),
        )

    def cancel(self, ids: Collection[int]) -> list[Job]:
        """Cancel what is queued at once, and what waits for it; ask what is running to stop. Returns those named."""
        return self._write("cancelling jobs", lambda connection: transitions.cancel(connection, ids))

    def retry(self, ids: Collection[int]) -> list[Job]:
        """Put failed and cancelled jobs back into the queue, counts at zero, and what was cancelled because of them.

        Returns:
            Those named and those that came back with them, as they now stand. One that waits for a job that has failed
            or was cancelled, and is not named, is still cancelled.
        """
        return self._write("putting jobs back", lambda connection: transitions.retry(connection, ids))

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
        return self._write("settling a rung", lambda connection: transitions.settle(connection, promote, prune))

    def get(self, job_id: int) -> Job:
        """One job. Raises `JobError` when there is none."""
        return self._read("reading a job", lambda connection: queries.get(connection, job_id))

    def find(self, kind: JobKind, spec_hashes: Collection[str]) -> dict[str, Job]:
        """The jobs of a kind with these spec hashes, by spec hash."""
        return self._read("reading jobs", lambda connection: queries.find(connection, kind, spec_hashes))

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
        return self._read(
            "reading jobs",
            lambda connection: queries.jobs(
                connection,
                ids=ids,
                kinds=kinds,
                experiment=experiment,
                states=states,
                limit=limit,
                after_id=after_id,
            ),
        )

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        depth = self.depth()
        return {state: sum(depth[kind, state] for kind in JobKind) for state in JobState}

    def depth(self, experiment: str | None = None) -> dict[tuple[JobKind, JobState], int]:
        """How many jobs there are of each kind in each state."""
        return self._read("counting jobs", lambda connection: queries.depth(connection, experiment))

    def held(self, experiment: str | None = None) -> int:
        """How many queued jobs are held until `settle`."""
        return self._read("counting jobs", lambda connection: queries.held(connection, experiment))

    def waits_for(self, job_id: int) -> list[Job]:
        """The jobs that must succeed before this one may be claimed, so far as they have not."""
        return self._read("reading jobs", lambda connection: queries.waits_for(connection, job_id))

    def time(self) -> float:
        """Seconds since the epoch, by the database's clock."""
        return self._read("reading the clock", queries.database_time)

    def attempts(self, job_id: int) -> list[Attempt]:
        """All attempts of a job, the first one first."""
        return self._read("reading attempts", lambda connection: queries.attempts(connection, job_id))

    def open_attempts(self) -> list[Attempt]:
        """All attempts that have not ended."""
        return self._read("reading attempts", queries.open_attempts)

    def recent(self, kind: JobKind, limit: int = 50) -> list[Attempt]:
        """The attempts of this kind that succeeded last, the newest first."""
        return self._read("reading attempts", lambda connection: queries.recent(connection, kind, limit))

    def announce(self, worker: Worker, info: Mapping[str, Any]) -> None:
        """Say that a worker is there, and what it is like; again and again, so that its silence shows."""
        self._write("announcing a worker", lambda connection: transitions.announce(connection, worker, info))

    def retire(self, worker: Worker) -> None:
        """Say that a worker has ended."""
        self._write("retiring a worker", lambda connection: transitions.retire(connection, worker))

    def workers(self) -> list[WorkerInfo]:
        """Workers that have announced themselves and not retired, those silent for a day left out."""
        return self._read("listing workers", transitions.workers)


def every_job(
    queue: JobStore,
    *,
    kinds: Collection[JobKind] | None = None,
    experiment: str | None = None,
    states: Collection[JobState] | None = None,
    page_size: int = 1000,
) -> Iterator[Job]:
    """All jobs that fit (see `JobStore.jobs`) by their numbers, read in pages."""
    last = 0
    while page := queue.jobs(kinds=kinds, experiment=experiment, states=states, limit=page_size, after_id=last):
        yield from page
        last = page[-1].id


def _storable(text: str) -> str:
    """A text as a database takes it: without secrets, without the odd bytes that a crash leaves in its last words."""
    return redact(text).encode(errors="backslashreplace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
