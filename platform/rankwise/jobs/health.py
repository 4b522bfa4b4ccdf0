"""Whether the queue's database can be used as it is, looked at without changing it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, exists, func, select
from sqlalchemy.engine import make_url

from rankwise.exceptions import JobStoreError
from rankwise.jobs import queries
from rankwise.jobs.database import current_revision, database_errors, head_revision, known_revisions, open_engine
from rankwise.jobs.job import JobState, WorkerInfo
from rankwise.jobs.mapping import BADLY_ENDED, HELD_STATES
from rankwise.jobs.rows import AttemptRow, DependencyRow, JobRow
from rankwise.jobs.workers import workers


@dataclass(frozen=True, kw_only=True)
class Health:
    """What was found.

    Attributes:
        url: The database, without its password.
        revision: Of its schema; None when it is empty.
        head: The revision that this release needs.
        jobs: How many there are; None where the schema is another one.
        problems: What is wrong and what to do, one sentence each; empty when all is well.
    """

    url: str
    revision: str | None
    head: str
    jobs: int | None
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `rankwise db check --json` prints."""
        return {
            "url": self.url,
            "revision": self.revision,
            "head": self.head,
            "jobs": self.jobs,
            "problems": list(self.problems),
        }


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What the database says at one moment.

    Attributes:
        health: Of the database.
        seconds: How long an answer took.
        ahead: Seconds that this machine's clock is before the database's; wrong by at most half of `seconds`.
        workers: Those that have announced themselves and not retired.
        waiting: Jobs that are queued, held ones left out.
    """

    health: Health
    seconds: float
    ahead: float
    workers: tuple[WorkerInfo, ...]
    waiting: int


def shown(url: str) -> str:
    """A database URL without its password; of a SQLite file its path as people write it."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return f"sqlite:///{parsed.database}"
    return parsed.render_as_string(hide_password=True)


def check(url: str) -> Health:
    """Look at the queue's database: reachable, of this release's revision, whole, and its rows at one with each other.

    Raises:
        JobStoreError: It cannot be reached or read, or the URL is none.
    """
    _exists(url)
    engine = open_engine(url)
    try:
        with database_errors("checking the queue"):
            revision, head = current_revision(engine), head_revision()
            jobs = None
            problems = _revision(revision, head)
            with engine.execution_options(rankwise_read_only=True).begin() as connection:
                problems += _file(engine, connection)
                if revision == head:
                    jobs = connection.scalar(select(func.count()).select_from(JobRow))
                    problems += _rows(connection)
    finally:
        engine.dispose()
    return Health(url=shown(url), revision=revision, head=head, jobs=jobs, problems=tuple(problems))


def glance(url: str) -> Glance:
    """Look at the database, its clock and its workers, without changing anything.

    Raises:
        JobStoreError: As `check`.
    """
    health = check(url)
    if health.problems:
        return Glance(health=health, seconds=0.0, ahead=0.0, workers=(), waiting=0)
    engine = open_engine(url)
    try:
        with (
            database_errors("looking at the queue"),
            engine.execution_options(rankwise_read_only=True).begin() as connection,
        ):
            there = tuple(workers(connection))
            waiting = connection.scalar(
                select(func.count()).where(JobRow.state == str(JobState.QUEUED), JobRow.held.is_(False))
            )
            before, started = time.time(), time.perf_counter()
            theirs = queries.time(connection)
            seconds = time.perf_counter() - started
    finally:
        engine.dispose()
    ahead = before + seconds / 2 - theirs
    return Glance(health=health, seconds=seconds, ahead=ahead, workers=there, waiting=waiting or 0)


def is_there(url: str) -> bool:
    """Whether there is a queue to look at: false for a SQLite file that is not there; a server is always asked."""
    path = make_url(url).database if url.startswith("sqlite") else None
    return not path or path == ":memory:" or Path(path).exists()


def _exists(url: str) -> None:
    """Raise rather than let SQLite make an empty file."""
    if not is_there(url):
        raise JobStoreError(
            f"there is no queue at {make_url(url).database}: `rankwise db upgrade` makes one, and so does the first "
            "`submit` or `run`; if there should be one, see where RANKWISE_HOME and RANKWISE_DATABASE_URL point"
        )


def _revision(revision: str | None, head: str) -> list[str]:
    if revision == head:
        return []
    if revision is None:
        return [f"the database is empty: `rankwise db upgrade` makes the tables of revision {head}"]
    if revision in known_revisions():
        return [f"the database has revision {revision}, this release needs {head}: run `rankwise db upgrade`"]
    return [
        f"the database has revision {revision}, which this release does not know (it knows up to {head}): "
        "it was written by a newer rankwise; install that one"
    ]


def _file(engine: Engine, connection: Connection) -> list[str]:
    if engine.dialect.name != "sqlite":
        return []
    found = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(5)") if row[0] != "ok"]
    problems = [f"the file is damaged: {text}; restore it from a backup" for text in found]
    loose = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if loose:
        problems.append(f"{len(loose)} rows name jobs that are not there, the first one in table {loose[0][0]}")
    return problems


def _rows(connection: Connection) -> list[str]:
    """What must hold between rows. Every transition keeps it; only a hand that edits the database can break it."""
    earlier = JobRow.__table__.alias("earlier")
    open_attempt = exists().where(AttemptRow.token == JobRow.token, AttemptRow.ended_at.is_(None))
    its_job = exists().where(JobRow.token == AttemptRow.token, JobRow.state.in_(HELD_STATES))
    in_vain = exists().where(
        DependencyRow.job_id == JobRow.id,
        DependencyRow.after_id == earlier.c.id,
        earlier.c.state.in_(BADLY_ENDED),
    )
    queued = JobRow.state == str(JobState.QUEUED)
    rules = [
        (JobRow, (JobRow.state.in_(HELD_STATES), ~open_attempt), "jobs are held by nobody"),
        (JobRow, (JobRow.state.not_in(HELD_STATES), JobRow.token.is_not(None)), "jobs that nobody holds have a token"),
        (AttemptRow, (AttemptRow.ended_at.is_(None), ~its_job), "attempts go on whose job is held by another one"),
        (JobRow, (queued, in_vain), "jobs wait for one that has failed or was cancelled"),
    ]
    found = [
        (connection.scalar(select(func.count()).select_from(table).where(*conditions)), text)
        for table, conditions, text in rules
    ]
    return [f"{count} {text}" for count, text in found if count]
