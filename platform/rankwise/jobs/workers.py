"""Which workers there are: what they say of themselves. Nothing is decided by it, it is for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from rankwise.jobs.clock import now
from rankwise.jobs.job import Worker, WorkerInfo
from rankwise.jobs.rows import WorkerRow

_FORGOTTEN_S = 86_400.0
"""A worker that has been silent for a day is not listed any more."""


def announce(connection: Connection, worker: Worker, info: Mapping[str, Any]) -> None:
    """See `JobStore.announce`."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    values = {"host": worker.host, "pid": worker.pid, "seen_at": now(), "info": dict(info)}
    connection.execute(
        dialect.insert(WorkerRow)
        .values(name=worker.name, started_at=now(), **values)
        .on_conflict_do_update(index_elements=["name"], set_=values)
    )
    connection.execute(delete(WorkerRow).where(_silent() >= _FORGOTTEN_S))


def retire(connection: Connection, worker: Worker) -> None:
    """See `JobStore.retire`."""
    connection.execute(delete(WorkerRow).where(WorkerRow.name == worker.name))


def workers(connection: Connection) -> list[WorkerInfo]:
    """See `JobStore.workers`."""
    columns = (*WorkerRow.__table__.columns, _silent().label("silent"))
    rows = connection.execute(select(*columns).where(_silent() < _FORGOTTEN_S).order_by(WorkerRow.name))
    return [WorkerInfo(**row._mapping) for row in rows]


def _silent() -> ColumnElement[float]:
    """Seconds since a worker was heard of."""
    return now() - WorkerRow.seen_at
