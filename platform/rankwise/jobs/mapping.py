"""From rows to plain values, and the conditions that several statements share."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Select, select

from rankwise.jobs.job import Attempt, Job, JobKind, JobState, Outcome
from rankwise.jobs.rows import AttemptRow, JobRow

HELD_STATES = (str(JobState.RUNNING), str(JobState.UPLOADING))
BADLY_ENDED = (str(JobState.FAILED), str(JobState.CANCELLED))
PART = 500
"""Rows named in one statement by values of their own: SQLite allows 32,766 bound values a statement."""


def job_columns() -> Select[Any]:
    """All columns of jobs, for `as_job`."""
    return select(*JobRow.__table__.columns)


def as_job(row: Any) -> Job:
    """One row of `job_columns`."""
    values = dict(row._mapping)
    return Job(**{**values, "kind": JobKind(values["kind"]), "state": JobState(values["state"])})


def attempt_columns() -> Select[Any]:
    """All columns of attempts, for `as_attempt`."""
    return select(*AttemptRow.__table__.columns)


def as_attempt(row: Any) -> Attempt:
    """One row of `attempt_columns`."""
    values = dict(row._mapping)
    outcome = values["outcome"]
    return Attempt(**{**values, "outcome": None if outcome is None else Outcome(outcome)})


def holding(token: str) -> tuple[ColumnElement[bool], ...]:
    """That a token speaks for the job."""
    return JobRow.token == token, JobRow.state.in_(HELD_STATES)


def queued(**changes: Any) -> dict[str, Any]:
    """What a job is that waits for a worker."""
    return {"state": str(JobState.QUEUED), "token": None, "not_before": 0.0, **changes}
