"""What is read from the queue. Each function runs inside one reading transaction, which blocks nobody.

- Whether the queue's database can be used as it is, looked at without changing it.
- How the work under way goes on: packs with their progress, and when all will be done. No database, no clock.
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
    for start in range(0, len(hashes), BATCH):
        query = job_columns().where(JobRow.kind == str(kind), JobRow.spec_hash.in_(hashes[start : start + BATCH]))
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
class QueueSnapshot:
    """What the database says at one moment.

    Attributes:
        health: Of the database.
        seconds: How long an answer took.
        ahead: Seconds that this machine's clock is before the database's; wrong by at most half of `seconds`.
        workers: Those that have announced themselves and not retired.
        waiting: Jobs that are queued, held ones left out.
    """

    health: DatabaseHealth
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


def check(url: str) -> DatabaseHealth:
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
    return DatabaseHealth(url=shown(url), revision=revision, head=head, jobs=jobs, problems=tuple(problems))


def take_snapshot(url: str) -> QueueSnapshot:
    """Look at the database, its clock and its workers, without changing anything.

    Raises:
        JobStoreError: As `check`.
    """
    health = check(url)
    if health.problems:
        return QueueSnapshot(health=health, seconds=0.0, ahead=0.0, workers=(), waiting=0)
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
            theirs = database_time(connection)
            seconds = time.perf_counter() - started
    finally:
        engine.dispose()
    ahead = before + seconds / 2 - theirs
    return QueueSnapshot(health=health, seconds=seconds, ahead=ahead, workers=there, waiting=waiting or 0)


def database_file_exists(url: str) -> bool:
    """Whether there is a queue to look at: false for a SQLite file that is not there; a server is always asked."""
    path = make_url(url).database if url.startswith("sqlite") else None
    return not path or path == ":memory:" or Path(path).exists()


def _exists(url: str) -> None:
    """Raise rather than let SQLite make an empty file."""
    if not database_file_exists(url):
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
    for parent in sorted({row.parent for row in loose}, reverse=True):
        tables = [row.table for row in loose if row.parent == parent]
        problems.append(f"{len(tables)} rows name {parent}s that are not there, the first one in table {tables[0]}")
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


@dataclass(frozen=True, kw_only=True)
class PackProgress:
    """Jobs that one worker does together.

    Attributes:
        pack_id: Names the pack.
        kind: Of its jobs.
        experiment: Of its first job.
        worker: Who does it.
        jobs: Ids of its jobs.
        phase: What the worker does (load, tokenize, train, ...); None before the first report.
        step: Of the slowest job.
        steps: The last step of that job.
        tokens_per_second: Of all of them together.
        seconds: Since it was claimed.
        silent: Seconds since the last report of progress.
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
        """One pack of `rankwise status --json`."""
        return {**asdict(self), "kind": str(self.kind), "jobs": list(self.jobs)}


def packs(jobs: Mapping[int, Job], attempts: Iterable[Attempt], time: float) -> list[PackProgress]:
    """Group the open attempts by pack.

    Args:
        jobs: The jobs of the attempts, by id.
        attempts: Those that have not ended.
        time: Now, by the database's clock.
    """
    groups: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        job = jobs.get(attempt.job_id)
        # One that was claimed after the jobs were read shows the next time.
        if job is not None and job.pack_id is not None:
            groups[job.pack_id, attempt.worker].append(attempt)
    return [_pack(pack_id, jobs, group, time) for (pack_id, _), group in groups.items()]


def _pack(pack_id: str, jobs: Mapping[int, Job], group: Sequence[Attempt], time: float) -> PackProgress:
    first = jobs[group[0].job_id]
    slowest = min(group, key=_done)
    said = slowest.progress or {}
    speeds = [speed for each in group if (speed := (each.progress or {}).get("tokens_per_second"))]
    reports = [attempt.progress_at for attempt in group if attempt.progress_at is not None]
    return PackProgress(
        pack_id=pack_id,
        kind=first.kind,
        experiment=first.experiment,
        worker=group[0].worker,
        jobs=tuple(attempt.job_id for attempt in group),
        phase=said.get("phase"),
        step=said.get("step"),
        steps=said.get("steps"),
        tokens_per_second=sum(speeds) if speeds else None,
        seconds=time - min(attempt.started_at for attempt in group),
        silent=time - max(reports) if reports else None,
    )


def _done(attempt: Attempt) -> float:
    """The part of an attempt that is done, from 0 to 1."""
    said = attempt.progress or {}
    step, steps = said.get("step"), said.get("steps")
    return min(1.0, step / steps) if step and steps else 0.0


def remaining_seconds(
    *, queued: int, running: Sequence[Attempt], recent: Sequence[Attempt], time: float
) -> float | None:
    """Seconds until all jobs of a kind are done, at the pace of late.

    The pace is what succeeded last over the time in which any of it was worked on, so that neither the pauses between
    two sweeps nor the number of workers and arms of a pack need to be known. Before anything has succeeded it is told
    from the steps of what runs.

    Args:
        queued: How many wait.
        running: The open attempts of this kind.
        recent: The attempts that succeeded last.
        time: Now, by the database's clock.

    Returns:
        None where nothing runs or nothing can be said yet; 0 where nothing is left.
    """
    left = queued + sum(1.0 - _done(attempt) for attempt in running)
    if queued == 0 and not running:
        return 0.0
    if not running:
        return None
    pace = len(recent) / busy if (busy := _busy_seconds(recent)) > 0 else _pace_of(running, time)
    return left / pace if pace > 0 else None


def _busy_seconds(attempts: Iterable[Attempt]) -> float:
    """The length of the union of the attempts' times."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((each.started_at, each.ended_at) for each in attempts if each.ended_at is not None):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _pace_of(running: Iterable[Attempt], time: float) -> float:
    """Jobs a second that the steps of running attempts promise."""
    return sum(_done(each) / (time - each.started_at) for each in running if time > each.started_at)
