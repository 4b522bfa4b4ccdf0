"""What is read from the queue. Each function runs inside one reading transaction, which blocks nobody."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, func, select

from rankwise.exceptions import JobError
from rankwise.jobs.clock import now
from rankwise.jobs.job import Attempt, Job, JobKind, JobState, Outcome
from rankwise.jobs.mapping import PART, as_attempt, as_job, attempt_columns, holding, job_columns
from rankwise.jobs.rows import AttemptRow, DependencyRow, JobRow
from rankwise.jobs.sets import one_of

PAGE = 1000
"""Jobs of one page, where nothing else is asked for."""
_LARGEST = 2**31 - 1


def holds(connection: Connection, token: str) -> bool:
    """See `JobStore.holds`."""
    return connection.scalar(select(JobRow.id).where(*holding(token))) is not None


def get(connection: Connection, job_id: int) -> Job:
    """See `JobStore.get`."""
    # A number that the database has no room for is no job's either.
    known = job_id <= _LARGEST
    row = connection.execute(job_columns().where(JobRow.id == job_id)).one_or_none() if known else None
    if row is None:
        raise JobError(f"there is no job {job_id}; `rankwise jobs list` shows those there are")
    return as_job(row)


def find(connection: Connection, kind: JobKind, spec_hashes: Collection[str]) -> dict[str, Job]:
    """See `JobStore.find`."""
    hashes = list(spec_hashes)
    found: dict[str, Job] = {}
    for start in range(0, len(hashes), PART):
        query = job_columns().where(JobRow.kind == str(kind), JobRow.spec_hash.in_(hashes[start : start + PART]))
        found |= {row.spec_hash: as_job(row) for row in connection.execute(query)}
    return found


def jobs(
    connection: Connection,
    *,
    ids: Collection[int] | None,
    kinds: Collection[JobKind] | None,
    experiment: str | None,
    states: Collection[JobState] | None,
    limit: int | None,
    after_id: int,
) -> list[Job]:
    """See `JobStore.jobs`."""
    # The ids come from indexes alone; only the rows of the page are read, whose specs make them wide.
    page = select(JobRow.id).where(JobRow.id > after_id).order_by(JobRow.id)
    if limit is not None or ids is None:
        page = page.limit(PAGE if limit is None else limit)
    if ids is not None:
        page = page.where(one_of(JobRow.id, ids))
    if kinds is not None:
        page = page.where(JobRow.kind.in_([str(kind) for kind in kinds]))
    if experiment is not None:
        page = page.where(JobRow.experiment == experiment)
    if states is not None:
        page = page.where(JobRow.state.in_([str(state) for state in states]))
    chosen = connection.scalars(page).all()
    rows = connection.execute(job_columns().where(one_of(JobRow.id, chosen)).order_by(JobRow.id))
    return [as_job(row) for row in rows]


def depth(connection: Connection, experiment: str | None) -> dict[tuple[JobKind, JobState], int]:
    """See `JobStore.depth`."""
    query = select(JobRow.kind, JobRow.state, func.count()).group_by(JobRow.kind, JobRow.state)
    if experiment is not None:
        query = query.where(JobRow.experiment == experiment)
    found = {(JobKind(kind), JobState(state)): count for kind, state, count in connection.execute(query)}
    return {(kind, state): found.get((kind, state), 0) for kind in JobKind for state in JobState}


def held(connection: Connection, experiment: str | None) -> int:
    """See `JobStore.held`."""
    query = select(func.count()).select_from(JobRow).where(JobRow.state == str(JobState.QUEUED), JobRow.held)
    if experiment is not None:
        query = query.where(JobRow.experiment == experiment)
    return connection.scalar(query) or 0


def waits_for(connection: Connection, job_id: int) -> list[Job]:
    """See `JobStore.waits_for`."""
    query = job_columns().join(DependencyRow, DependencyRow.after_id == JobRow.id)
    rows = connection.execute(query.where(DependencyRow.job_id == job_id).order_by(JobRow.id))
    return [job for job in map(as_job, rows) if job.state is not JobState.SUCCEEDED]


def time(connection: Connection) -> float:
    """See `JobStore.time`."""
    return connection.scalars(select(now())).one()


def attempts(connection: Connection, job_id: int) -> list[Attempt]:
    """See `JobStore.attempts`."""
    query = attempt_columns().where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)
    return [as_attempt(row) for row in connection.execute(query)]


def open_attempts(connection: Connection) -> list[Attempt]:
    """See `JobStore.open_attempts`."""
    query = attempt_columns().where(AttemptRow.ended_at.is_(None)).order_by(AttemptRow.job_id)
    return [as_attempt(row) for row in connection.execute(query)]


def recent(connection: Connection, kind: JobKind, limit: int) -> list[Attempt]:
    """See `JobStore.recent`."""
    query = (
        attempt_columns()
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(AttemptRow.outcome == str(Outcome.SUCCEEDED), JobRow.kind == str(kind))
        .order_by(AttemptRow.ended_at.desc())
        .limit(limit)
    )
    return [as_attempt(row) for row in connection.execute(query)]
