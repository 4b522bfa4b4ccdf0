"""Read-only queries of the queue: jobs and attempts, the health of the database, progress and remaining time.

Queries with a connection run inside one reading transaction, which blocks no writer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, exists, func, select
from sqlalchemy.engine import make_url

from rankwise.exceptions import JobError, JobStoreError
from rankwise.jobs.database import current_revision, database_errors, head_revision, known_revisions, open_engine
from rankwise.jobs.job import Attempt, Job, JobKind, JobState, Outcome, WorkerInfo
from rankwise.jobs.rows import (
    BADLY_ENDED,
    BATCH,
    HELD_STATES,
    AttemptRow,
    DependencyRow,
    JobRow,
    as_attempt,
    as_job,
    attempt_columns,
    holding,
    job_columns,
    now,
    one_of,
)
from rankwise.jobs.transitions import workers

PAGE = 1000
"""Default number of jobs per page."""
_LARGEST = 2**31 - 1


def holds(connection: Connection, token: str) -> bool:
    """See `JobStore.holds`."""
    return connection.scalar(select(JobRow.id).where(*holding(token))) is not None


def get(connection: Connection, job_id: int) -> Job:
    """See `JobStore.get`."""
    # PostgreSQL refuses to compare with larger numbers, which are not ids.
    known = job_id <= _LARGEST
    row = connection.execute(job_columns().where(JobRow.id == job_id)).one_or_none() if known else None
    if row is None:
        raise JobError(f"there is no job {job_id}; `rankwise jobs list` lists all jobs")
    return as_job(row)


def find(connection: Connection, kind: JobKind, spec_hashes: Collection[str]) -> dict[str, Job]:
    """See `JobStore.find`."""
    hashes = list(spec_hashes)
    jobs: dict[str, Job] = {}
    for start in range(0, len(hashes), BATCH):
        query = job_columns().where(JobRow.kind == str(kind), JobRow.spec_hash.in_(hashes[start : start + BATCH]))
        jobs |= {row.spec_hash: as_job(row) for row in connection.execute(query)}
    return jobs


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
    # The ids come from indexes alone; only the rows of the page, which are wide, are read.
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
    counts = {(JobKind(kind), JobState(state)): count for kind, state, count in connection.execute(query)}
    return {(kind, state): counts.get((kind, state), 0) for kind in JobKind for state in JobState}


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


def database_time(connection: Connection) -> float:
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


@dataclass(frozen=True, kw_only=True)
class DatabaseHealth:
    """The result of checking the queue's database.

    `url` is without password. `revision` is the schema's (None for an empty database), `head` that of this release.
    `jobs` is None if they differ. `problems` say what to do, one sentence each.
    """

    url: str
    revision: str | None
    head: str
    jobs: int | None
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The document of `rankwise db check --json`."""
        return {
            "url": self.url,
            "revision": self.revision,
            "head": self.head,
            "jobs": self.jobs,
            "problems": list(self.problems),
        }


@dataclass(frozen=True, kw_only=True)
class QueueSnapshot:
    """The state of the queue at one moment.

    A query took `seconds`. This machine's clock is `ahead` of the database's by that many seconds, with an error of at
    most half of `seconds`. `waiting` counts queued jobs that are not held.
    """

    health: DatabaseHealth
    seconds: float
    ahead: float
    workers: tuple[WorkerInfo, ...]
    waiting: int


def shown(url: str) -> str:
    """A database URL for messages, without its password."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return f"sqlite:///{parsed.database}"
    return parsed.render_as_string(hide_password=True)


def check(url: str) -> DatabaseHealth:
    """Check that the database is reachable, has this release's schema, and is undamaged and consistent.

    Raises:
        JobStoreError: It does not exist or cannot be read, or the URL is invalid.
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
    return DatabaseHealth(url=shown(url), revision=revision, head=head, jobs=jobs, problems=tuple(problems))


def take_snapshot(url: str) -> QueueSnapshot:
    """Read the state of the database, its clock and its workers."""
    health = check(url)
    if health.problems:
        return QueueSnapshot(health=health, seconds=0.0, ahead=0.0, workers=(), waiting=0)
    engine = open_engine(url)
    try:
        with (
            database_errors("reading the queue"),
            engine.execution_options(rankwise_read_only=True).begin() as connection,
        ):
            announced = tuple(workers(connection))
            waiting = connection.scalar(
                select(func.count()).where(JobRow.state == str(JobState.QUEUED), JobRow.held.is_(False))
            )
            before, started = time.time(), time.perf_counter()
            database_clock = database_time(connection)
            seconds = time.perf_counter() - started
    finally:
        engine.dispose()
    ahead = before + seconds / 2 - database_clock
    return QueueSnapshot(health=health, seconds=seconds, ahead=ahead, workers=announced, waiting=waiting or 0)


def database_file_exists(url: str) -> bool:
    """Whether the SQLite file of a URL exists; always true for a server."""
    path = make_url(url).database if url.startswith("sqlite") else None
    return not path or path == ":memory:" or Path(path).exists()


def _exists(url: str) -> None:
    """Raise instead of letting SQLite create an empty file."""
    if not database_file_exists(url):
        raise JobStoreError(
            f"there is no queue at {make_url(url).database}: `rankwise db upgrade` creates one, and so does the first "
            "`submit` or `run`; if there should be one, check RANKWISE_HOME and RANKWISE_DATABASE_URL"
        )


def _revision(revision: str | None, head: str) -> list[str]:
    if revision == head:
        return []
    if revision is None:
        return [f"the database is empty: `rankwise db upgrade` creates the tables of revision {head}"]
    if revision in known_revisions():
        return [f"the database has revision {revision}, this release needs {head}: run `rankwise db upgrade`"]
    return [
        f"the database has revision {revision}, which this release does not know (it knows up to {head}): "
        "it was written by a newer rankwise; install that one"
    ]


def _file(engine: Engine, connection: Connection) -> list[str]:
    if engine.dialect.name != "sqlite":
        return []
    damage = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(5)") if row[0] != "ok"]
    problems = [f"the file is damaged: {text}; restore it from a backup" for text in damage]
    dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    for parent in sorted({row.parent for row in dangling}, reverse=True):
        tables = [row.table for row in dangling if row.parent == parent]
        problems.append(f"{len(tables)} rows refer to missing {parent}s, the first one in table {tables[0]}")
    return problems


def _rows(connection: Connection) -> list[str]:
    """Check invariants between rows, which only manual edits of the database can break."""
    earlier = JobRow.__table__.alias("earlier")
    open_attempt = exists().where(AttemptRow.token == JobRow.token, AttemptRow.ended_at.is_(None))
    its_job = exists().where(JobRow.token == AttemptRow.token, JobRow.state.in_(HELD_STATES))
    unreachable = exists().where(
        DependencyRow.job_id == JobRow.id,
        DependencyRow.after_id == earlier.c.id,
        earlier.c.state.in_(BADLY_ENDED),
    )
    queued = JobRow.state == str(JobState.QUEUED)
    rules = [
        (JobRow, (JobRow.state.in_(HELD_STATES), ~open_attempt), "jobs in progress have no open attempt"),
        (
            JobRow,
            (JobRow.state.not_in(HELD_STATES), JobRow.token.is_not(None)),
            "jobs that are not in progress have a token",
        ),
        (
            AttemptRow,
            (AttemptRow.ended_at.is_(None), ~its_job),
            "open attempts belong to jobs that another attempt holds",
        ),
        (JobRow, (queued, unreachable), "queued jobs wait for a failed or cancelled job"),
    ]
    violations = [
        (connection.scalar(select(func.count()).select_from(table).where(*conditions)), text)
        for table, conditions, text in rules
    ]
    return [f"{count} {text}" for count, text in violations if count]


@dataclass(frozen=True, kw_only=True)
class PackProgress:
    """The progress of the jobs that one worker runs together.

    `phase` is load, tokenize, train, ...; None before the first report. `step` of `steps` is that of the slowest job,
    `tokens_per_second` that of all jobs together. The pack was claimed `seconds` ago; its last report was `silent`
    seconds ago.
    """

    pack_id: str
    kind: JobKind
    experiment: str
    worker: str
    jobs: tuple[int, ...]
    phase: str | None
    step: int | None
    steps: int | None
    tokens_per_second: float | None
    seconds: float
    silent: float | None

    def to_json(self) -> dict[str, Any]:
        """The pack in `rankwise status --json`."""
        return {**asdict(self), "kind": str(self.kind), "jobs": list(self.jobs)}


def packs(jobs: Mapping[int, Job], attempts: Iterable[Attempt], time: float) -> list[PackProgress]:
    """Group open attempts by pack. `jobs` are given by id; `time` is now by the database's clock."""
    groups: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        job = jobs.get(attempt.job_id)
        # A job claimed after the jobs were read is shown next time.
        if job is not None and job.pack_id is not None:
            groups[job.pack_id, attempt.worker].append(attempt)
    return [_pack(pack_id, jobs, group, time) for (pack_id, _), group in groups.items()]


def _pack(pack_id: str, jobs: Mapping[int, Job], group: Sequence[Attempt], time: float) -> PackProgress:
    first = jobs[group[0].job_id]
    slowest = min(group, key=_done)
    report = slowest.progress or {}
    speeds = [speed for attempt in group if (speed := (attempt.progress or {}).get("tokens_per_second"))]
    reports = [attempt.progress_at for attempt in group if attempt.progress_at is not None]
    return PackProgress(
        pack_id=pack_id,
        kind=first.kind,
        experiment=first.experiment,
        worker=group[0].worker,
        jobs=tuple(attempt.job_id for attempt in group),
        phase=report.get("phase"),
        step=report.get("step"),
        steps=report.get("steps"),
        tokens_per_second=sum(speeds) if speeds else None,
        seconds=time - min(attempt.started_at for attempt in group),
        silent=time - max(reports) if reports else None,
    )


def _done(attempt: Attempt) -> float:
    """The completed share of an attempt, from 0 to 1."""
    report = attempt.progress or {}
    step, steps = report.get("step"), report.get("steps")
    return min(1.0, step / steps) if step and steps else 0.0


def remaining_seconds(
    *, queued: int, running: Sequence[Attempt], recent: Sequence[Attempt], time: float
) -> float | None:
    """Estimated seconds until all jobs of a kind are done; None if unknown or nothing runs, 0 if nothing is left.

    The pace is the number of recent successes over the time in which any of them was running, which accounts for pauses
    between sweeps and for parallel workers and packs. Before the first success, it comes from the steps of running
    attempts. `time` is now by the database's clock.
    """
    left = queued + sum(1.0 - _done(attempt) for attempt in running)
    if queued == 0 and not running:
        return 0.0
    if not running:
        return None
    pace = len(recent) / busy if (busy := _busy_seconds(recent)) > 0 else _pace_of(running, time)
    return left / pace if pace > 0 else None


def _busy_seconds(attempts: Iterable[Attempt]) -> float:
    """The total time in which at least one of the attempts was running."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(
        (attempt.started_at, attempt.ended_at) for attempt in attempts if attempt.ended_at is not None
    ):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _pace_of(running: Iterable[Attempt], time: float) -> float:
    """Jobs per second, extrapolated from the steps of running attempts."""
    return sum(_done(attempt) / (time - attempt.started_at) for attempt in running if time > attempt.started_at)
