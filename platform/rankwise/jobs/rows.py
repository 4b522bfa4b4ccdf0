"""The tables of the queue, SQL expressions for ids, clock and tokens, and the conversion of rows to plain values.

Migrations in `migrations/` create the tables; a test checks that both agree. Times come from the database's clock: no
decision uses a worker's clock.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    Integer,
    Select,
    String,
    Text,
    UniqueConstraint,
    false,
    select,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.functions import FunctionElement

from rankwise.jobs.job import Attempt, Job, JobKind, JobState, Outcome


class Table(DeclarativeBase):
    """Base of the tables."""


class DefinitionRow(Table):
    """A definition that jobs refer to, by the SHA-256 of its text."""

    __tablename__ = "definition"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    text: Mapped[str] = mapped_column(Text)


class JobRow(Table):
    """One job."""

    __tablename__ = "job"
    __table_args__ = (
        UniqueConstraint("kind", "spec_hash", name="uq_job_kind_spec_hash"),
        # The order in which a claim searches for the first job, then for the rest of its pack. Both read only the rows
        # that they take, however long the queue is.
        Index("ix_job_claim", "state", "held", text("priority DESC"), "id"),
        Index("ix_job_pack", "state", "pack_key", "pack_id", text("priority DESC"), "id"),
        Index("ix_job_experiment", "experiment", "id"),
        # Counts and pages by state read only this index, not the wide rows.
        Index("ix_job_state", "state", "kind", "id"),
        # Finds the jobs that refer to a definition.
        Index("ix_job_definition", "definition"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(16))
    experiment: Mapped[str] = mapped_column(String(255))
    spec_hash: Mapped[str] = mapped_column(String(64))
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(16))
    pack_key: Mapped[str | None] = mapped_column(String(64))
    pack_id: Mapped[str | None] = mapped_column(String(64))
    token: Mapped[str | None] = mapped_column(String(64), unique=True)
    priority: Mapped[int] = mapped_column(Integer, server_default="0")
    not_before: Mapped[float] = mapped_column(Float, server_default="0")
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    failures: Mapped[int] = mapped_column(Integer, server_default="0")
    preemptions: Mapped[int] = mapped_column(Integer, server_default="0")
    lost: Mapped[int] = mapped_column(Integer, server_default="0")
    cancel_requested: Mapped[bool] = mapped_column(Boolean, server_default=false())
    held: Mapped[bool] = mapped_column(Boolean, server_default=false())
    checkpoint: Mapped[int] = mapped_column(Integer, server_default="0")
    cancelled_by: Mapped[int | None] = mapped_column(Integer)
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Float)
    updated_at: Mapped[float] = mapped_column(Float)
    definition: Mapped[str | None] = mapped_column(ForeignKey("definition.digest"))


class DependencyRow(Table):
    """`job_id` waits until `after_id` has succeeded."""

    __tablename__ = "job_dependency"
    # The primary key finds what a job waits for; this index finds what waits for a job.
    __table_args__ = (Index("ix_dependency_after", "after_id", "job_id"),)

    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    after_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)


class AttemptRow(Table):
    """One execution of a job."""

    __tablename__ = "attempt"
    __table_args__ = (
        Index("ix_attempt_job", "job_id"),
        Index("ix_attempt_open", "ended_at", "lease_until"),
        Index("ix_attempt_recent", "outcome", "ended_at"),
    )

    token: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    worker: Mapped[str] = mapped_column(String(255))
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[float] = mapped_column(Float)
    lease_until: Mapped[float] = mapped_column(Float)
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    progress_at: Mapped[float | None] = mapped_column(Float)
    ended_at: Mapped[float | None] = mapped_column(Float)
    outcome: Mapped[str | None] = mapped_column(String(16))
    error: Mapped[str | None] = mapped_column(Text)


class WorkerRow(Table):
    """A worker that has been announced and not retired."""

    __tablename__ = "worker"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[float] = mapped_column(Float)
    seen_at: Mapped[float] = mapped_column(Float)
    info: Mapped[dict[str, Any]] = mapped_column(JSON)


class AliasRow(Table):
    """An alias; its row is locked while it is moved."""

    __tablename__ = "alias"

    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    alias: Mapped[str] = mapped_column(String(255), primary_key=True)


class AliasMoveRow(Table):
    """One move of an alias."""

    __tablename__ = "alias_move"
    __table_args__ = (Index("ix_alias_move", "name", "alias", "id"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(256))
    alias: Mapped[str] = mapped_column(String(255))
    from_version: Mapped[int | None] = mapped_column(Integer)
    to_version: Mapped[int | None] = mapped_column(Integer)
    run_id: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text)
    moved_by: Mapped[str] = mapped_column(String(255))
    moved_at: Mapped[float] = mapped_column(Float)


class PromotionAttemptRow(Table):
    """One comparison of a candidate with the holder of an alias on some rows."""

    __tablename__ = "promotion_attempt"
    __table_args__ = (Index("ix_promotion_attempt", "name", "alias", "id"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(256))
    alias: Mapped[str] = mapped_column(String(255))
    key: Mapped[str] = mapped_column(String(64))
    candidate: Mapped[int] = mapped_column(Integer)
    champion: Mapped[int | None] = mapped_column(Integer)
    prompts: Mapped[list[str]] = mapped_column(JSON)
    verdict: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    run_id: Mapped[str | None] = mapped_column(String(64))
    attempted_by: Mapped[str] = mapped_column(String(255))
    attempted_at: Mapped[float] = mapped_column(Float)


class _id_list(FunctionElement[int]):
    """The numbers of a JSON array as a subquery."""

    type = Integer()
    inherit_cache = True


@compiles(_id_list, "sqlite")
def _given_sqlite(element: _id_list, compiler: Any, **kwargs: Any) -> str:
    return f"(SELECT value FROM json_each({compiler.process(element.clauses, **kwargs)}))"


@compiles(_id_list, "postgresql")
def _given_postgresql(element: _id_list, compiler: Any, **kwargs: Any) -> str:
    array = compiler.process(element.clauses, **kwargs)
    return f"(SELECT value::integer FROM json_array_elements_text(CAST({array} AS json)))"


def one_of(column: Any, ids: Collection[int]) -> ColumnElement[bool]:
    """Whether the integer column holds one of these ids, passed as a single bound value.

    SQLite allows 32,766 bound values per statement, PostgreSQL 65,535, and binding thousands is slow.
    """
    condition: ColumnElement[bool] = column.op("IN", is_comparison=True, return_type=Boolean())(
        _id_list(json.dumps(sorted(ids)))
    )
    return condition


class now(FunctionElement[float]):
    """Seconds since the epoch by the database's clock."""

    type = Float()
    inherit_cache = True


class new_token(FunctionElement[str]):
    """A random token, different for every row."""

    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **kwargs: Any) -> str:
    # 2440587.5 is the Julian day of 1970-01-01T00:00Z; unixepoch('subsec') needs SQLite 3.42.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **kwargs: Any) -> str:
    # Not now(), which does not advance within a transaction that waited for a lock.
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(new_token, "sqlite")
def _token_sqlite(element: new_token, compiler: Any, **kwargs: Any) -> str:
    return "lower(hex(randomblob(16)))"


@compiles(new_token, "postgresql")
def _token_postgresql(element: new_token, compiler: Any, **kwargs: Any) -> str:
    return "replace(gen_random_uuid()::text, '-', '')"


DEFINITION = "definition"
"""The key of a payload whose text is stored in its own table."""
HELD_STATES = (str(JobState.RUNNING), str(JobState.UPLOADING))
BADLY_ENDED = (str(JobState.FAILED), str(JobState.CANCELLED))
BATCH = 500
"""Rows with bound values of their own in one statement."""


def job_columns() -> Select[Any]:
    """All columns of jobs, and the text of their definition, for `as_job`."""
    columns = (*JobRow.__table__.columns, DefinitionRow.text.label("definition_text"))
    return select(*columns).select_from(JobRow).outerjoin(DefinitionRow, DefinitionRow.digest == JobRow.definition)


def as_job(row: Any) -> Job:
    """Convert a row of `job_columns`. Jobs queued by 0.1.0 have their definition in the payload."""
    values = dict(row._mapping)
    text = values.pop("definition_text")
    if values.pop("definition") is not None:
        values["spec"] = {**values["spec"], DEFINITION: text}
    return Job(**{**values, "kind": JobKind(values["kind"]), "state": JobState(values["state"])})


def attempt_columns() -> Select[Any]:
    """All columns of attempts, for `as_attempt`."""
    return select(*AttemptRow.__table__.columns)


def as_attempt(row: Any) -> Attempt:
    """Convert a row of `attempt_columns`."""
    values = dict(row._mapping)
    outcome = values["outcome"]
    return Attempt(**{**values, "outcome": None if outcome is None else Outcome(outcome)})


def holding(token: str) -> tuple[ColumnElement[bool], ...]:
    """The conditions that a token is the current one of its job."""
    return JobRow.token == token, JobRow.state.in_(HELD_STATES)


def queued(**changes: Any) -> dict[str, Any]:
    """Column values of a job that waits for a worker."""
    return {"state": str(JobState.QUEUED), "token": None, "not_before": 0.0, **changes}
