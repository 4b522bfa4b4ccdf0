"""The `JobStore`: the queue's interface, on SQLite and PostgreSQL.

Each method is one transaction; the statements are in `submission`, `transitions` and `queries`. PostgreSQL locks the
first eligible job with `FOR UPDATE SKIP LOCKED`, so that claimers do not wait for each other. SQLite has one writer at
a time (`BEGIN IMMEDIATE`), so the same statements need no lock. `tests/helpers/job_store_contract.py` tests both.
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
    """The durable queue of jobs. Safe to use from several threads and processes.

    Every transition is one UPDATE conditioned on the job's state and, for its worker, on the token. A method that takes
    a token returns whether the token was still valid; on `False`, publish nothing for the job. All times are by the
    database's clock.

    Raises:
        JobStoreError: From every method, if the database cannot be reached, is locked too long, or has another schema.
    """

    def __init__(self, url: str, *, lock: Path, limits: Limits | None = None) -> None:
        """Open the database and upgrade its schema. `lock` is the file that serializes migrations.

        Raises:
            JobStoreError: The database cannot be reached, or a newer release wrote it.
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
        """The history of alias moves, in the same database."""
        return AliasHistory(self._engine, self._reader)

    def _write(self, doing: str, work: Callable[[Connection], T]) -> T:
        """Run `work` in a writing transaction, and retry if PostgreSQL aborts it because of a deadlock."""
        with database_errors(doing):
            for left in reversed(range(_TRIES)):
                try:
                    with self._engine.begin() as connection:
                        return work(connection)
                except DBAPIError as error:
                    if left == 0 or getattr(error.orig, "sqlstate", None) not in {_DEADLOCK, _SERIALIZATION}:
                        raise
            raise AssertionError("the last attempt returns or raises")

    def _read(self, doing: str, work: Callable[[Connection], T]) -> T:
        with database_errors(doing), self._reader.begin() as connection:
            return work(connection)

    def submit(self, jobs: Sequence[NewJob], *, again: bool = False) -> list[Job]:
        """Add jobs, and return them in the same order; an existing job (same kind and spec hash) is left unchanged.

        `after` of a queued job names jobs that must succeed first; if one of them has failed or was cancelled, the job
        is cancelled at once. With `again`, failed and cancelled jobs are requeued with the new spec and their counters
        at zero.

        Raises:
            JobError: Jobs would wait for themselves; none is added.
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
        """Claim the first eligible job and up to `max_arms - 1` more of its pack; empty if no job is eligible.

        Eligible: queued, not held, due, and all dependencies have succeeded. The jobs of a pack have the same
        `pack_key` and `pack_id`, so an interrupted pack is claimed as a whole. The claim expires after `lease` seconds
        without a heartbeat. `kinds`, `among` (ids) and `experiment` restrict the search.
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
        """Send a heartbeat: renew the leases for `lease` seconds and store progress, given by token.

        An integer `checkpoint` in the progress, the step saved last, resets the job's count of lost workers if it is
        the highest so far.
        """
        return self._write(
            "sending a heartbeat",
            lambda connection: transitions.beat(connection, tokens, lease=lease, progress=progress or {}),
        )

    def set_run(self, token: str, run_id: str) -> bool:
        """Store the MLflow run of the job."""
        return self._write(
            "storing a run", lambda connection: transitions.change(connection, token, mlflow_run_id=run_id)
        )

    def assign_run(self, job_id: int, run_id: str) -> bool:
        """Store the MLflow run of a job without one, whatever its state; `False` if it has one."""
        return self._write("storing a run", lambda connection: transitions.assign_run(connection, job_id, run_id))

    def uploading(self, token: str, result: Mapping[str, Any]) -> bool:
        """Store the result; publication is pending."""
        values = {"state": str(JobState.UPLOADING), "result": dict(result)}
        return self._write("storing a result", lambda connection: transitions.change(connection, token, **values))

    def holds(self, token: str) -> bool:
        """Whether the token is still valid; check before every external write."""
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
        """End the attempt and change the job's state according to the outcome.

        A job that would return to the queue is cancelled if a user requested that. Jobs that wait for a failed or
        cancelled job are cancelled too. Repeating the call with the same outcome changes nothing and returns `True`, so
        a caller that lost the reply may retry.

        An earlier `result` is kept if None is given. Secrets in `error` are redacted. A requeued job may be claimed
        after `wait` seconds; after a failure, at least the backoff.
        """
        stored_error = None if error is None else _storable(error)
        return self._write(
            "finishing a job",
            lambda connection: transitions.finish(
                connection, token, outcome, self._limits, result=result, error=stored_error, wait=wait
            ),
        )

    def finish_together(
        self, tokens: Collection[str], outcome: Outcome, *, error: str | None = None, wait: float = 0.0
    ) -> frozenset[str]:
        """End several attempts like `finish`, in one transaction, so that a pack is requeued as a whole.

        Returns the tokens for which `finish` would return `True`.
        """
        stored_error = None if error is None else _storable(error)
        return self._write(
            "finishing jobs",
            lambda connection: transitions.finish_together(
                connection, tokens, outcome, self._limits, error=stored_error, wait=wait
            ),
        )

    def reclaim(self, *, host: str | None = None, alive: Collection[int] = ()) -> list[Job]:
        """Requeue jobs whose lease has expired, or that are held on `host` by a process not among `alive`."""
        return self._write(
            "reclaiming jobs",
            lambda connection: transitions.reclaim(connection, self._limits, host=host, alive=alive),
        )

    def cancel(self, ids: Collection[int]) -> list[Job]:
        """Cancel queued jobs and jobs that wait for them; request running ones to stop. Returns the jobs of `ids`."""
        return self._write("cancelling jobs", lambda connection: transitions.cancel(connection, ids))

    def retry(self, ids: Collection[int]) -> list[Job]:
        """Requeue failed and cancelled jobs with their counters at zero, and jobs cancelled because of them.

        A job stays cancelled if it waits for a failed or cancelled job that is not requeued. Returns the given jobs and
        those requeued with them.
        """
        return self._write("requeuing jobs", lambda connection: transitions.retry(connection, ids))

    def forget(self, ids: Collection[int], reason: str) -> list[Job]:
        """Cancel succeeded jobs and drop their results and runs, so that a submission repeats them.

        `reason` becomes their error. Queued jobs that wait for them are cancelled. Returns the changed jobs.
        """
        return self._write("forgetting jobs", lambda connection: transitions.forget(connection, ids, reason))

    def settle(self, promote: Collection[int], prune: Mapping[int, str]) -> list[Job]:
        """Release the held jobs in `promote`, and cancel those in `prune` with the reason as their error.

        Jobs that are no longer held stay unchanged. Returns the changed jobs.

        Raises:
            ValueError: A job is in both.
        """
        return self._write("settling a rung", lambda connection: transitions.settle(connection, promote, prune))

    def get(self, job_id: int) -> Job:
        """One job; raises `JobError` if it does not exist."""
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
        """A page of jobs by id. Without a limit: all jobs of `ids`, or the first 1,000."""
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
        """Number of jobs by state."""
        depth = self.depth()
        return {state: sum(depth[kind, state] for kind in JobKind) for state in JobState}

    def depth(self, experiment: str | None = None) -> dict[tuple[JobKind, JobState], int]:
        """Number of jobs by kind and state."""
        return self._read("counting jobs", lambda connection: queries.depth(connection, experiment))

    def held(self, experiment: str | None = None) -> int:
        """Number of queued jobs that are held until `settle`."""
        return self._read("counting jobs", lambda connection: queries.held(connection, experiment))

    def waits_for(self, job_id: int) -> list[Job]:
        """The jobs that must still succeed before this one may be claimed."""
        return self._read("reading jobs", lambda connection: queries.waits_for(connection, job_id))

    def time(self) -> float:
        """Seconds since the epoch by the database's clock."""
        return self._read("reading the clock", queries.database_time)

    def attempts(self, job_id: int) -> list[Attempt]:
        """All attempts of a job, oldest first."""
        return self._read("reading attempts", lambda connection: queries.attempts(connection, job_id))

    def open_attempts(self) -> list[Attempt]:
        """All attempts that have not ended."""
        return self._read("reading attempts", queries.open_attempts)

    def recent(self, kind: JobKind, limit: int = 50) -> list[Attempt]:
        """The latest successful attempts of this kind, newest first."""
        return self._read("reading attempts", lambda connection: queries.recent(connection, kind, limit))

    def announce(self, worker: Worker, info: Mapping[str, Any]) -> None:
        """Announce a worker with facts about it. Repeat this regularly, so that a silent worker is noticed."""
        self._write("announcing a worker", lambda connection: transitions.announce(connection, worker, info))

    def retire(self, worker: Worker) -> None:
        """Remove a worker that ends."""
        self._write("retiring a worker", lambda connection: transitions.retire(connection, worker))

    def workers(self) -> list[WorkerInfo]:
        """Announced workers, without those that retired or were silent for a day."""
        return self._read("listing workers", transitions.workers)


def every_job(
    queue: JobStore,
    *,
    kinds: Collection[JobKind] | None = None,
    experiment: str | None = None,
    states: Collection[JobState] | None = None,
    page_size: int = 1000,
) -> Iterator[Job]:
    """All matching jobs by id (see `JobStore.jobs`), read in pages."""
    last = 0
    while page := queue.jobs(kinds=kinds, experiment=experiment, states=states, limit=page_size, after_id=last):
        yield from page
        last = page[-1].id


def _storable(text: str) -> str:
    """Text that every database accepts: secrets redacted, invalid characters of a crash's output escaped."""
    return redact(text).encode(errors="backslashreplace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
