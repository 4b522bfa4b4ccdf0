"""The tables. Migrations in `migrations/` create them; a test holds that both say the same."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint, false, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Table(DeclarativeBase):
    """Root of the tables."""


class JobRow(Table):
    """One job."""

    __tablename__ = "job"
    __table_args__ = (
        UniqueConstraint("kind", "spec_hash", name="uq_job_kind_spec_hash"),
        # The order in which a claim looks for the first eligible job, and then for its mates: both read the rows they
        # take and no others, however long the queue is.
        Index("ix_job_claim", "state", "held", text("priority DESC"), "id"),
        Index("ix_job_pack", "state", "pack_key", "pack_id", text("priority DESC"), "id"),
        Index("ix_job_experiment", "experiment", "id"),
        # Counts and pages by state read this index alone, not the rows with their specs.
        Index("ix_job_state", "state", "kind", "id"),
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


class DependencyRow(Table):
    """`job_id` waits until `after_id` has succeeded."""

    __tablename__ = "job_dependency"
    # The primary key finds what a job waits for; this one, who waits for it.
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
    """A worker that has announced itself and not retired."""

    __tablename__ = "worker"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[float] = mapped_column(Float)
    seen_at: Mapped[float] = mapped_column(Float)
    info: Mapped[dict[str, Any]] = mapped_column(JSON)


class AliasRow(Table):
    """An alias that has been moved; its row is locked while it is."""

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
