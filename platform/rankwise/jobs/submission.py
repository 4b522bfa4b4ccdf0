"""Submitting jobs, their dependencies, and the definitions that they share.

Rows of `job_dependency` say which jobs must succeed before a job is claimed. When one of them fails or is cancelled,
the job is cancelled in the same transaction, and so are the jobs that wait for it. A definition is stored once, by its
digest, however many jobs refer to it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from sqlalchemy import Connection, delete, exists, select, update
from sqlalchemy.dialects import postgresql, sqlite

from rankwise.exceptions import JobError
from rankwise.jobs.job import Job, JobKind, JobState, NewJob, title
from rankwise.jobs.rows import (
    BADLY_ENDED,
    BATCH,
    DEFINITION,
    DefinitionRow,
    DependencyRow,
    JobRow,
    as_job,
    job_columns,
    now,
    one_of,
    queued,
)

_ENDED = {str(JobState.FAILED): "failed", str(JobState.CANCELLED): "was cancelled"}


def refuse_cycles(connection: Connection, ids: Collection[int]) -> None:
    """Refuse circular dependencies, since such jobs could never be claimed.

    Raises:
        JobError: Some of `ids` wait, directly or through others, for themselves.
    """
    waits_for: dict[int, set[int]] = {}
    wave = set(ids)
    while wave:
        earlier = JobRow.__table__.alias("earlier")
        rows = connection.execute(
            select(DependencyRow.job_id, DependencyRow.after_id)
            .join(earlier, earlier.c.id == DependencyRow.after_id)
            .where(one_of(DependencyRow.job_id, wave), earlier.c.state != str(JobState.SUCCEEDED))
        ).all()
        for row in rows:
            waits_for.setdefault(row.job_id, set()).add(row.after_id)
        wave = {row.after_id for row in rows} - waits_for.keys()
    try:
        TopologicalSorter(waits_for).prepare()
    except CycleError as error:
        cycle = ", ".join(str(job_id) for job_id in sorted(set(error.args[1])))
        raise JobError(
            f"jobs would wait for themselves forever: {cycle}; submit without --after one of these"
        ) from error


def cancel_dependents(connection: Connection, ended: Collection[int]) -> None:
    """Cancel all queued jobs that wait, directly or through others, for one of `ended` (failed or cancelled jobs)."""
    wave: Collection[int] = ended
    while wave:
        earlier = JobRow.__table__.alias("earlier")
        rows = connection.execute(
            select(JobRow.id, earlier.c.id.label("earlier"), earlier.c.kind, earlier.c.spec_hash, earlier.c.state)
            .join(DependencyRow, DependencyRow.job_id == JobRow.id)
            .join(earlier, earlier.c.id == DependencyRow.after_id)
            .where(one_of(DependencyRow.after_id, wave), JobRow.state == str(JobState.QUEUED))
            .where(earlier.c.state.in_(BADLY_ENDED))
            .order_by(JobRow.id, earlier.c.id)
        ).all()
        waiting: dict[int, list[int]] = defaultdict(list)
        reasons = {row.earlier: f"{title(row.earlier, row.kind, row.spec_hash)} {_ENDED[row.state]}" for row in rows}
        for row in rows:
            waiting[row.earlier].append(row.id)
        changed: set[int] = set()
        for cause, ids in waiting.items():
            changed.update(
                connection.scalars(
                    update(JobRow)
                    .where(one_of(JobRow.id, ids), JobRow.state == str(JobState.QUEUED))
                    .values(
                        state=str(JobState.CANCELLED),
                        held=False,
                        cancelled_by=cause,
                        error=reasons[cause],
                        updated_at=now(),
                    )
                    .returning(JobRow.id)
                )
            )
        wave = changed


def cancel_unreachable(connection: Connection, ids: Collection[int]) -> None:
    """Cancel those of `ids` that wait for a failed or cancelled job.

    The jobs that they wait for are locked (`FOR SHARE`; SQLite has one writer anyway). Otherwise a job could fail in a
    transaction that does not yet see the rows of `ids`, which would then wait forever.
    """
    earlier = select(DependencyRow.after_id).where(one_of(DependencyRow.job_id, ids))
    locked = select(JobRow.id, JobRow.state).where(JobRow.id.in_(earlier)).order_by(JobRow.id)
    rows = connection.execute(locked.with_for_update(read=True)).all()
    cancel_dependents(connection, [row.id for row in rows if row.state in BADLY_ENDED])


def requeue(connection: Connection, ids: Collection[int], *, dependents: bool) -> list[int]:
    """Requeue failed and cancelled jobs with their counters at zero; other jobs are left unchanged.

    With `dependents`, jobs that were cancelled because of them are requeued too. Returns all requeued ids.
    """
    values: dict[str, Any] = queued(
        failures=0,
        preemptions=0,
        lost=0,
        error=None,
        cancel_requested=False,
        held=False,
        cancelled_by=None,
        pack_id=None,
        updated_at=now(),
    )
    requeued: list[int] = []
    wave: Collection[int] = ids
    while wave:
        changed = list(
            connection.scalars(
                update(JobRow)
                .where(one_of(JobRow.id, wave), JobRow.state.in_(BADLY_ENDED))
                .values(**values)
                .returning(JobRow.id)
            )
        )
        requeued += changed
        if not dependents:
            break
        wave = connection.scalars(
            select(JobRow.id).where(
                one_of(JobRow.cancelled_by, changed),
                JobRow.state == str(JobState.CANCELLED),
                JobRow.id.in_(select(DependencyRow.job_id).where(one_of(DependencyRow.after_id, changed))),
            )
        ).all()
    return requeued


def submit(connection: Connection, jobs: Sequence[NewJob], *, again: bool) -> list[Job]:
    """See `JobStore.submit`."""
    if not jobs:
        return []
    _store_definitions(connection, jobs)
    insert = _insert(connection, JobRow).on_conflict_do_nothing(index_elements=["kind", "spec_hash"])
    connection.execute(
        insert.values(created_at=now(), updated_at=now(), not_before=0.0),
        [
            {
                "kind": str(job.kind),
                "experiment": job.experiment,
                "spec_hash": job.spec_hash,
                **_payload(job),
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
    # An existing job keeps its definition, so the new one may be unused; a requeued job drops its old one.
    _remove_unused_definitions(connection)
    stored = _stored(connection, jobs)
    return [stored[job.kind, job.spec_hash] for job in jobs]


def _definition(job: NewJob) -> str | None:
    text = job.spec.get(DEFINITION)
    return text if isinstance(text, str) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _payload(job: NewJob) -> dict[str, Any]:
    """The payload of a job, with its definition replaced by None, and the digest of the definition."""
    text = _definition(job)
    if text is None:
        return {"spec": job.spec, "definition": None}
    return {"spec": {**job.spec, DEFINITION: None}, "definition": _digest(text)}


def _store_definitions(connection: Connection, jobs: Sequence[NewJob]) -> None:
    texts = {_digest(text): text for text in {_definition(job) for job in jobs} if text is not None}
    insert = _insert(connection, DefinitionRow)
    # The update changes nothing but locks the row, which must stay until the jobs that refer to it exist.
    insert = insert.on_conflict_do_update(index_elements=["digest"], set_={"digest": insert.excluded.digest})
    for digest, text in sorted(texts.items()):
        connection.execute(insert.values(digest=digest, text=text))


def _remove_unused_definitions(connection: Connection) -> None:
    """Remove unused definitions, except those locked by other submissions."""
    unused = ~exists().where(JobRow.definition == DefinitionRow.digest)
    digests = connection.scalars(select(DefinitionRow.digest).where(unused).with_for_update(skip_locked=True)).all()
    if digests:
        # Checked again, since a job may have been added before its definition was locked here.
        connection.execute(delete(DefinitionRow).where(DefinitionRow.digest.in_(digests), unused))


def _insert(connection: Connection, table: type[Any]) -> Any:
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def _stored(connection: Connection, jobs: Sequence[NewJob]) -> dict[tuple[JobKind, str], Job]:
    stored: dict[tuple[JobKind, str], Job] = {}
    for start in range(0, len(jobs), BATCH):
        query = job_columns().where(JobRow.spec_hash.in_([job.spec_hash for job in jobs[start : start + BATCH]]))
        stored |= {(job.kind, job.spec_hash): job for job in map(as_job, connection.execute(query))}
    return stored


def _again(connection: Connection, jobs: Sequence[NewJob]) -> None:
    given = {(str(job.kind), job.spec_hash): job for job in jobs}
    for start in range(0, len(jobs), BATCH):
        hashes = [job.spec_hash for job in jobs[start : start + BATCH]]
        ended = connection.execute(
            select(JobRow.id, JobRow.kind, JobRow.spec_hash)
            .where(JobRow.spec_hash.in_(hashes), JobRow.state.in_(BADLY_ENDED))
            .order_by(JobRow.id)
        ).all()
        wanted = {row.id: given[row.kind, row.spec_hash] for row in ended if (row.kind, row.spec_hash) in given}
        for job_id in requeue(connection, list(wanted), dependents=False):
            job = wanted[job_id]
            values = {**_payload(job), "experiment": job.experiment, "pack_key": job.pack_key}
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(**values, priority=job.priority))


def _depend(connection: Connection, jobs: Sequence[NewJob]) -> None:
    """Store dependencies of queued jobs; running and ended jobs wait for nothing."""
    after = {(str(job.kind), job.spec_hash): job.after for job in jobs if job.after}
    hashes = sorted({spec_hash for _, spec_hash in after})
    waiting: list[int] = []
    pairs: list[dict[str, int]] = []
    for start in range(0, len(hashes), BATCH):
        queued = (
            select(JobRow.id, JobRow.kind, JobRow.spec_hash)
            .where(JobRow.spec_hash.in_(hashes[start : start + BATCH]), JobRow.state == str(JobState.QUEUED))
            .order_by(JobRow.id)
        )
        for row in connection.execute(queued.with_for_update()):
            earlier = after.get((row.kind, row.spec_hash), ())
            pairs += [{"job_id": row.id, "after_id": after_id} for after_id in earlier]
            waiting += [row.id] if earlier else []
    if pairs:
        connection.execute(_insert(connection, DependencyRow).on_conflict_do_nothing(), pairs)
        refuse_cycles(connection, waiting)
        cancel_unreachable(connection, waiting)
