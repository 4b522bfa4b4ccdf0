"""The job store on SQLite and PostgreSQL.

Each transition is one UPDATE whose predicate names state and token; what follows from it is in the same transaction.
PostgreSQL locks the first eligible job with `FOR UPDATE SKIP LOCKED`, so that claimers do not wait for one another;
SQLite has one writer at a time (`BEGIN IMMEDIATE`), so the same statements need no lock there.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, exists, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from rankwise.exceptions import JobError
from rankwise.jobs.clock import new_token, now
from rankwise.jobs.database import database_errors, open_engine, upgrade
from rankwise.jobs.job import Beat, Job, JobKind, JobState, Limits, NewJob, Outcome, Worker
from rankwise.jobs.rows import AttemptRow, DependencyRow, JobRow

_HELD = (JobState.RUNNING, JobState.UPLOADING)
_SUBMIT_ROWS = 500  # rows of one INSERT: SQLite allows 32,766 bound values a statement


class SqlJobStore:
    """`JobStore` over SQLAlchemy."""

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

    @contextmanager
    def _write(self, doing: str) -> Iterator[Connection]:
        with database_errors(doing), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _read(self, doing: str) -> Iterator[Connection]:
        with database_errors(doing), self._reader.begin() as connection:
            yield connection

    def submit(self, jobs: Sequence[NewJob], *, again: bool = False) -> list[Job]:
        """See `JobStore.submit`."""
        dialect = sqlite if self._engine.dialect.name == "sqlite" else postgresql
        with self._write("submitting jobs") as connection:
            for start in range(0, len(jobs), _SUBMIT_ROWS):
                part = jobs[start : start + _SUBMIT_ROWS]
                statement = dialect.insert(JobRow).on_conflict_do_nothing(index_elements=["kind", "spec_hash"])
                rows = [
                    {
                        "kind": str(job.kind),
                        "experiment": job.experiment,
                        "spec_hash": job.spec_hash,
                        "spec": job.spec,
                        "state": str(JobState.QUEUED),
                        "pack_key": job.pack_key,
                        "priority": job.priority,
                    }
                    for job in part
                ]
                connection.execute(
                    statement.values(
                        [{**row, "created_at": now(), "updated_at": now(), "not_before": 0.0} for row in rows]
                    )
                )
                for job in part if again else ():
                    connection.execute(
                        update(JobRow)
                        .where(
                            JobRow.kind == str(job.kind),
                            JobRow.spec_hash == job.spec_hash,
                            JobRow.state.in_([str(JobState.FAILED), str(JobState.CANCELLED)]),
                        )
                        .values(
                            **_queued(),
                            spec=job.spec,
                            experiment=job.experiment,
                            failures=0,
                            lost=0,
                            error=None,
                            cancel_requested=False,
                            pack_id=None,
                        )
                    )
            stored = self._by_hash(connection, jobs)
            ordered = [stored[job.kind, job.spec_hash] for job in jobs]
            after = [
                {"job_id": row.id, "after_id": earlier}
                for row, job in zip(ordered, jobs, strict=True)
                for earlier in job.after
            ]
            if after:
                connection.execute(dialect.insert(DependencyRow).on_conflict_do_nothing(), after)
        return ordered

    def _by_hash(self, connection: Connection, jobs: Sequence[NewJob]) -> dict[tuple[JobKind, str], Job]:
        found: dict[tuple[JobKind, str], Job] = {}
        for start in range(0, len(jobs), _SUBMIT_ROWS):
            part = jobs[start : start + _SUBMIT_ROWS]
            query = _columns().where(JobRow.spec_hash.in_([job.spec_hash for job in part]))
            for row in connection.execute(query):
                job = _job(row)
                found[job.kind, job.spec_hash] = job
        return found

    def claim(
        self,
        worker: Worker,
        *,
        lease: float,
        max_arms: int = 1,
        kinds: Collection[JobKind] | None = None,
        among: Collection[int] | None = None,
    ) -> list[Job]:
        """See `JobStore.claim`."""
        eligible = _eligible(kinds, among)
        first = select(JobRow.id, JobRow.pack_key, JobRow.pack_id).where(eligible)
        first = first.order_by(JobRow.priority.desc(), JobRow.id).limit(1).with_for_update(skip_locked=True)
        with self._write("claiming a pack") as connection:
            head = connection.execute(first).one_or_none()
            if head is None:
                return []
            chosen = [head.id]
            if head.pack_key is not None and max_arms > 1:
                mates = select(JobRow.id).where(
                    eligible,
                    JobRow.id != head.id,
                    JobRow.pack_key == head.pack_key,
                    # A pack that was cut off is claimed again as the same arms, so that they share one step.
                    JobRow.pack_id.is_not_distinct_from(head.pack_id),
                )
                mates = mates.order_by(JobRow.priority.desc(), JobRow.id).limit(max_arms - 1)
                chosen += connection.scalars(mates.with_for_update(skip_locked=True)).all()
            taken = connection.execute(
                update(JobRow)
                .where(JobRow.id.in_(chosen), JobRow.state == str(JobState.QUEUED))
                .values(
                    state=str(JobState.RUNNING),
                    token=new_token(),
                    pack_id=head.pack_id or uuid.uuid4().hex,
                    attempts=JobRow.attempts + 1,
                    updated_at=now(),
                )
                .returning(*_columns().selected_columns)
            ).all()
            jobs = sorted((_job(row) for row in taken), key=lambda job: chosen.index(job.id))
            for job in jobs:
                connection.execute(
                    insert(AttemptRow).values(
                        token=job.token,
                        job_id=job.id,
                        number=job.attempts,
                        worker=worker.name,
                        host=worker.host,
                        pid=worker.pid,
                        started_at=now(),
                        lease_until=now() + lease,
                    )
                )
        return jobs

    def beat(self, tokens: Collection[str], *, lease: float, progress: Mapping[str, Any] | None = None) -> Beat:
        """See `JobStore.beat`."""
        values: dict[str, Any] = {"lease_until": now() + lease}
        if progress is not None:
            values |= {"progress": dict(progress), "progress_at": now()}
        with self._write("sending a heartbeat") as connection:
            owned = connection.execute(
                select(JobRow.token, JobRow.cancel_requested).where(
                    JobRow.token.in_(tokens), JobRow.state.in_([str(state) for state in _HELD])
                )
            ).all()
            held = frozenset(row.token for row in owned)
            connection.execute(
                update(AttemptRow).where(AttemptRow.token.in_(held), AttemptRow.ended_at.is_(None)).values(**values)
            )
        return Beat(held=held, cancelled=frozenset(row.token for row in owned if row.cancel_requested))

    def set_run(self, token: str, run_id: str) -> bool:
        """See `JobStore.set_run`."""
        return self._change(token, "noting a run", mlflow_run_id=run_id)

    def uploading(self, token: str, result: Mapping[str, Any]) -> bool:
        """See `JobStore.uploading`."""
        return self._change(token, "noting a result", state=str(JobState.UPLOADING), result=dict(result))

    def _change(self, token: str, doing: str, **values: Any) -> bool:
        with self._write(doing) as connection:
            changed = connection.execute(update(JobRow).where(*_holding(token)).values(**values, updated_at=now()))
            return changed.rowcount == 1

    def holds(self, token: str) -> bool:
        """See `JobStore.holds`."""
        with self._read("checking a token") as connection:
            return connection.scalar(select(JobRow.id).where(*_holding(token))) is not None

    def finish(
        self, token: str, outcome: Outcome, *, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> bool:
        """See `JobStore.finish`."""
        with self._write("finishing a job") as connection:
            failures = connection.scalar(select(JobRow.failures).where(*_holding(token)))
            if failures is None:
                return False
            values = self._after(outcome, failures)
            if result is not None:
                values["result"] = dict(result)
            if error is not None or outcome is Outcome.SUCCEEDED:
                values["error"] = error
            changed = connection.execute(update(JobRow).where(*_holding(token)).values(**values, updated_at=now()))
            if changed.rowcount == 1:
                _end_attempt(connection, token, outcome, error)
            return changed.rowcount == 1

    def _after(self, outcome: Outcome, failures: int) -> dict[str, Any]:
        """What a job becomes when an attempt ended so."""
        ended = {"token": None}
        if outcome is Outcome.SUCCEEDED:
            return {**ended, "state": str(JobState.SUCCEEDED)}
        if outcome is Outcome.FATAL:
            return {**ended, "state": str(JobState.FAILED), "failures": failures + 1}
        if outcome is Outcome.CANCELLED:
            return {**ended, "state": str(JobState.CANCELLED)}
        if outcome is Outcome.PREEMPTED:
            return {**_queued(), "preemptions": JobRow.preemptions + 1}
        if outcome is Outcome.LOST:
            raise ValueError("only `reclaim` says that an attempt is lost")
        if failures + 1 >= self._limits.failures:
            return {**ended, "state": str(JobState.FAILED), "failures": failures + 1}
        wait = self._limits.wait_after(failures + 1)
        return {**_queued(), "failures": failures + 1, "not_before": now() + wait}

    def reclaim(self, *, host: str | None = None, alive: Collection[int] = ()) -> list[Job]:
        """See `JobStore.reclaim`."""
        gone: ColumnElement[bool] = AttemptRow.lease_until < now()
        if host is not None:
            gone = or_(gone, and_(AttemptRow.host == host, AttemptRow.pid.not_in(alive)))
        stale = select(AttemptRow.token).where(AttemptRow.ended_at.is_(None), gone)
        with self._write("reclaiming jobs") as connection:
            tokens = connection.scalars(stale).all()
            if not tokens:
                return []
            poison = JobRow.lost + 1 >= self._limits.lost
            returned = connection.execute(
                update(JobRow)
                .where(JobRow.token.in_(tokens), JobRow.state.in_([str(state) for state in _HELD]))
                .values(
                    state=case(
                        (JobRow.cancel_requested, str(JobState.CANCELLED)),
                        (poison, str(JobState.FAILED)),
                        else_=str(JobState.QUEUED),
                    ),
                    error=case(
                        (poison, f"the worker was lost {self._limits.lost} times while it held this job"),
                        else_=JobRow.error,
                    ),
                    lost=JobRow.lost + 1,
                    token=None,
                    updated_at=now(),
                )
                .returning(*_columns().selected_columns)
            ).all()
            for token in tokens:
                _end_attempt(connection, token, Outcome.LOST, None)
        return [_job(row) for row in returned]

    def cancel(self, ids: Collection[int]) -> list[Job]:
        """See `JobStore.cancel`."""
        with self._write("cancelling jobs") as connection:
            connection.execute(
                update(JobRow)
                .where(JobRow.id.in_(ids), JobRow.state == str(JobState.QUEUED))
                .values(state=str(JobState.CANCELLED), updated_at=now())
            )
            connection.execute(
                update(JobRow)
                .where(JobRow.id.in_(ids), JobRow.state.in_([str(state) for state in _HELD]))
                .values(cancel_requested=True, updated_at=now())
            )
            rows = connection.execute(_columns().where(JobRow.id.in_(ids)).order_by(JobRow.id)).all()
        return [_job(row) for row in rows]

    def get(self, job_id: int) -> Job:
        """See `JobStore.get`."""
        with self._read("reading a job") as connection:
            row = connection.execute(_columns().where(JobRow.id == job_id)).one_or_none()
        if row is None:
            raise JobError(f"there is no job {job_id}; `rankwise jobs list` shows those there are")
        return _job(row)

    def find(self, kind: JobKind, spec_hashes: Collection[str]) -> dict[str, Job]:
        """See `JobStore.find`."""
        hashes = list(spec_hashes)
        found: dict[str, Job] = {}
        with self._read("reading jobs") as connection:
            for start in range(0, len(hashes), _SUBMIT_ROWS):
                part = hashes[start : start + _SUBMIT_ROWS]
                query = _columns().where(JobRow.kind == str(kind), JobRow.spec_hash.in_(part))
                found |= {row.spec_hash: _job(row) for row in connection.execute(query)}
        return found

    def jobs(
        self,
        *,
        experiment: str | None = None,
        states: Collection[JobState] | None = None,
        limit: int = 1000,
        after_id: int = 0,
    ) -> list[Job]:
        """See `JobStore.jobs`."""
        query = _columns().where(JobRow.id > after_id).order_by(JobRow.id).limit(limit)
        if experiment is not None:
            query = query.where(JobRow.experiment == experiment)
        if states is not None:
            query = query.where(JobRow.state.in_([str(state) for state in states]))
        with self._read("reading jobs") as connection:
            return [_job(row) for row in connection.execute(query)]

    def counts(self) -> dict[JobState, int]:
        """See `JobStore.counts`."""
        query = select(JobRow.state, func.count()).group_by(JobRow.state)
        with self._read("counting jobs") as connection:
            found = {JobState(state): count for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}


def _columns() -> Select[Any]:
    return select(*(column for column in JobRow.__table__.columns))


def _job(row: Any) -> Job:
    values = dict(row._mapping)
    return Job(**{**values, "kind": JobKind(values["kind"]), "state": JobState(values["state"])})


def _queued() -> dict[str, Any]:
    return {"state": str(JobState.QUEUED), "token": None, "not_before": 0.0}


def _holding(token: str) -> tuple[ColumnElement[bool], ...]:
    return JobRow.token == token, JobRow.state.in_([str(state) for state in _HELD])


def _eligible(kinds: Collection[JobKind] | None, among: Collection[int] | None) -> ColumnElement[bool]:
    earlier = JobRow.__table__.alias("earlier")
    waits = exists().where(
        DependencyRow.job_id == JobRow.id,
        DependencyRow.after_id == earlier.c.id,
        earlier.c.state != str(JobState.SUCCEEDED),
    )
    conditions: list[ColumnElement[bool]] = [
        JobRow.state == str(JobState.QUEUED),
        JobRow.not_before <= now(),
        ~waits,
    ]
    if kinds is not None:
        conditions.append(JobRow.kind.in_([str(kind) for kind in kinds]))
    if among is not None:
        conditions.append(JobRow.id.in_(among))
    return and_(*conditions)


def _end_attempt(connection: Connection, token: str, outcome: Outcome, error: str | None) -> None:
    connection.execute(
        update(AttemptRow)
        .where(AttemptRow.token == token, AttemptRow.ended_at.is_(None))
        .values(ended_at=now(), outcome=str(outcome), error=error)
    )
