"""What is decided about jobs from outside: cancel, try again, settle a rung. Each is part of one transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import Connection, select, update

from rankwise.jobs.clock import now
from rankwise.jobs.dependencies import cancel_dependents, cancel_in_vain, requeue
from rankwise.jobs.job import Job, JobState
from rankwise.jobs.mapping import HELD_STATES, as_job, job_columns
from rankwise.jobs.rows import JobRow
from rankwise.jobs.sets import one_of


def cancel(connection: Connection, ids: Collection[int]) -> list[Job]:
    """See `JobStore.cancel`."""
    _lock(connection, ids)
    ended = connection.scalars(
        update(JobRow)
        .where(one_of(JobRow.id, ids), JobRow.state == str(JobState.QUEUED))
        .values(state=str(JobState.CANCELLED), held=False, updated_at=now())
        .returning(JobRow.id)
    ).all()
    connection.execute(
        update(JobRow)
        .where(one_of(JobRow.id, ids), JobRow.state.in_(HELD_STATES))
        .values(cancel_requested=True, updated_at=now())
    )
    cancel_dependents(connection, ended)
    return _rows(connection, ids)


def retry(connection: Connection, ids: Collection[int]) -> list[Job]:
    """See `JobStore.retry`."""
    _lock(connection, ids)
    back = requeue(connection, ids, dependents=True)
    cancel_in_vain(connection, back)
    return _rows(connection, {*ids, *back})


def settle(connection: Connection, promote: Collection[int], prune: Mapping[int, str]) -> list[Job]:
    """See `JobStore.settle`."""
    both = sorted(prune.keys() & set(promote))
    if both:
        raise ValueError(f"jobs {both} are to be promoted and pruned at once")
    _lock(connection, {*promote, *prune})
    waiting = JobRow.state == str(JobState.QUEUED), JobRow.held
    changed = list(
        connection.scalars(
            update(JobRow)
            .where(one_of(JobRow.id, promote), *waiting)
            .values(held=False, not_before=0.0, updated_at=now())
            .returning(JobRow.id)
        )
    )
    pruned: list[int] = []
    for job_id, reason in sorted(prune.items()):
        pruned += connection.scalars(
            update(JobRow)
            .where(JobRow.id == job_id, *waiting)
            .values(state=str(JobState.CANCELLED), held=False, error=reason, updated_at=now())
            .returning(JobRow.id)
        ).all()
    cancel_dependents(connection, pruned)
    return _rows(connection, [*changed, *pruned])


def _lock(connection: Connection, ids: Collection[int]) -> None:
    """Lock rows in the order of their ids, as every other transaction does."""
    connection.execute(select(JobRow.id).where(one_of(JobRow.id, ids)).order_by(JobRow.id).with_for_update()).all()


def _rows(connection: Connection, ids: Collection[int]) -> list[Job]:
    return [as_job(row) for row in connection.execute(job_columns().where(one_of(JobRow.id, ids)).order_by(JobRow.id))]
