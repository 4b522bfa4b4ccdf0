"""How jobs get into the queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects import postgresql, sqlite

from rankwise.jobs.clock import now
from rankwise.jobs.dependencies import cancel_in_vain, refuse_circles, requeue
from rankwise.jobs.job import Job, JobKind, JobState, NewJob
from rankwise.jobs.mapping import BADLY_ENDED, PART, as_job, job_columns
from rankwise.jobs.rows import DependencyRow, JobRow


def submit(connection: Connection, jobs: Sequence[NewJob], *, again: bool) -> list[Job]:
    """See `JobStore.submit`."""
    if not jobs:
        return []
    insert = _insert(connection, JobRow).on_conflict_do_nothing(index_elements=["kind", "spec_hash"])
    connection.execute(
        insert.values(created_at=now(), updated_at=now(), not_before=0.0),
        [
            {
                "kind": str(job.kind),
                "experiment": job.experiment,
                "spec_hash": job.spec_hash,
                "spec": job.spec,
                "state": str(JobState.QUEUED),
                "pack_key": job.pack_key,
                "priority": job.priority,
            }
            for job in jobs
        ],
    )
    if again:
        _again(connection, jobs)
    _depend(connection, jobs)
    stored = _stored(connection, jobs)
    return [stored[job.kind, job.spec_hash] for job in jobs]


def _insert(connection: Connection, table: type[Any]) -> Any:
    """An INSERT of the database at hand, whose conflicts can be passed over."""
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def _stored(connection: Connection, jobs: Sequence[NewJob]) -> dict[tuple[JobKind, str], Job]:
    found: dict[tuple[JobKind, str], Job] = {}
    for start in range(0, len(jobs), PART):
        query = job_columns().where(JobRow.spec_hash.in_([job.spec_hash for job in jobs[start : start + PART]]))
        found |= {(job.kind, job.spec_hash): job for job in map(as_job, connection.execute(query))}
    return found


def _again(connection: Connection, jobs: Sequence[NewJob]) -> None:
    """Put those back that had ended badly, with the spec that is given now."""
    given = {(str(job.kind), job.spec_hash): job for job in jobs}
    for start in range(0, len(jobs), PART):
        hashes = [job.spec_hash for job in jobs[start : start + PART]]
        ended = connection.execute(
            select(JobRow.id, JobRow.kind, JobRow.spec_hash)
            .where(JobRow.spec_hash.in_(hashes), JobRow.state.in_(BADLY_ENDED))
            .order_by(JobRow.id)
        ).all()
        wanted = {row.id: given[row.kind, row.spec_hash] for row in ended if (row.kind, row.spec_hash) in given}
        for job_id in requeue(connection, list(wanted), dependents=False):
            job = wanted[job_id]
            values = {"spec": job.spec, "experiment": job.experiment, "pack_key": job.pack_key}
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(**values, priority=job.priority))


def _depend(connection: Connection, jobs: Sequence[NewJob]) -> None:
    """Note what the jobs come after. One that is under way or has ended waits for nothing any more."""
    after = {(str(job.kind), job.spec_hash): job.after for job in jobs if job.after}
    hashes = sorted({spec_hash for _, spec_hash in after})
    waiting: list[int] = []
    pairs: list[dict[str, int]] = []
    for start in range(0, len(hashes), PART):
        queued = (
            select(JobRow.id, JobRow.kind, JobRow.spec_hash)
            .where(JobRow.spec_hash.in_(hashes[start : start + PART]), JobRow.state == str(JobState.QUEUED))
            .order_by(JobRow.id)
        )
        for row in connection.execute(queued.with_for_update()):
            earlier = after.get((row.kind, row.spec_hash), ())
            pairs += [{"job_id": row.id, "after_id": each} for each in earlier]
            waiting += [row.id] if earlier else []
    if pairs:
        connection.execute(_insert(connection, DependencyRow).on_conflict_do_nothing(), pairs)
        refuse_circles(connection, waiting)
        cancel_in_vain(connection, waiting)
