"""State transitions of jobs (claim, heartbeat, finish, reclaim, cancel, retry, settle), and the list of workers.

Every function runs inside one writing transaction. A job has a token exactly while its attempt is open: a transition
ends both. Rows are locked in a fixed order, an attempt before its job and jobs by id, so that concurrent transitions
of a job do not deadlock. The list of workers is for display only.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, delete, exists, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from rankwise.jobs.job import HeartbeatReply, Job, JobKind, JobState, Limits, Outcome, Worker, WorkerInfo
from rankwise.jobs.rows import (
    BADLY_ENDED,
    HELD_STATES,
    AttemptRow,
    DependencyRow,
    JobRow,
    WorkerRow,
    as_job,
    holding,
    job_columns,
    new_token,
    now,
    one_of,
    queued,
)
from rankwise.jobs.submission import cancel_dependents, cancel_unreachable, requeue


def claim(
    connection: Connection,
    worker: Worker,
    *,
    lease: float,
    max_arms: int,
    kinds: Collection[JobKind] | None,
    among: Collection[int] | None,
    experiment: str | None,
) -> list[Job]:
    """See `JobStore.claim`."""
    eligible = _eligible(kinds, among, experiment)
    first = select(JobRow.id, JobRow.pack_key, JobRow.pack_id).where(eligible)
    first = first.order_by(JobRow.priority.desc(), JobRow.id).limit(1).with_for_update(skip_locked=True)
    head = connection.execute(first).one_or_none()
    if head is None:
        return []
    chosen = [head.id]
    if head.pack_key is not None and max_arms > 1:
        mates = select(JobRow.id).where(
            eligible,
            JobRow.id != head.id,
            JobRow.pack_key == head.pack_key,
            # An interrupted pack is claimed with the same arms, which are at the same step.
            JobRow.pack_id.is_(None) if head.pack_id is None else JobRow.pack_id == head.pack_id,
        )
        mates = mates.order_by(JobRow.priority.desc(), JobRow.id).limit(max_arms - 1)
        chosen += connection.scalars(mates.with_for_update(skip_locked=True)).all()
    taken = connection.scalars(
        update(JobRow)
        .where(JobRow.id.in_(chosen), JobRow.state == str(JobState.QUEUED))
        .values(
            state=str(JobState.RUNNING),
            token=new_token(),
            pack_id=head.pack_id or uuid.uuid4().hex,
            attempts=JobRow.attempts + 1,
            updated_at=now(),
        )
        .returning(JobRow.id)
    ).all()
    jobs = sorted(_rows(connection, taken), key=lambda job: chosen.index(job.id))
    for job in jobs:
        connection.execute(
            insert(AttemptRow).values(
                token=job.token,
                job_id=job.id,
                number=job.attempts,
                worker=worker.name,
                host=worker.host,
                pid=worker.pid,
                started_at=now(),
                lease_until=now() + lease,
            )
        )
    return jobs


def _eligible(
    kinds: Collection[JobKind] | None, among: Collection[int] | None, experiment: str | None
) -> ColumnElement[bool]:
    earlier = JobRow.__table__.alias("earlier")
    waits = exists().where(
        DependencyRow.job_id == JobRow.id,
        DependencyRow.after_id == earlier.c.id,
        earlier.c.state != str(JobState.SUCCEEDED),
    )
    conditions: list[ColumnElement[bool]] = [
        JobRow.state == str(JobState.QUEUED),
        JobRow.held.is_(False),
        JobRow.not_before <= now(),
        ~waits,
    ]
    if kinds is not None:
        conditions.append(JobRow.kind.in_([str(kind) for kind in kinds]))
    if among is not None:
        conditions.append(one_of(JobRow.id, among))
    if experiment is not None:
        conditions.append(JobRow.experiment == experiment)
    return and_(*conditions)


def beat(
    connection: Connection, tokens: Collection[str], *, lease: float, progress: Mapping[str, Mapping[str, Any]]
) -> HeartbeatReply:
    """See `JobStore.beat`."""
    held = frozenset(
        connection.scalars(
            update(AttemptRow)
            .where(AttemptRow.token.in_(sorted(tokens)), AttemptRow.ended_at.is_(None))
            .values(lease_until=now() + lease)
            .returning(AttemptRow.token)
        )
    )
    for token in sorted(held & progress.keys()):
        report = dict(progress[token])
        connection.execute(
            update(AttemptRow).where(AttemptRow.token == token).values(progress=report, progress_at=now())
        )
        kept = report.get("checkpoint")
        if isinstance(kept, int):
            # A new checkpoint shows progress, so earlier losses of workers were not the job's fault.
            connection.execute(
                update(JobRow)
                .where(*holding(token), JobRow.checkpoint < kept)
                .values(checkpoint=kept, lost=0, updated_at=now())
            )
    cancelled = select(JobRow.token).where(JobRow.token.in_(sorted(held)), JobRow.cancel_requested)
    return HeartbeatReply(
        held=held, cancelled=frozenset(token for token in connection.scalars(cancelled) if token is not None)
    )


def finish(
    connection: Connection,
    token: str,
    outcome: Outcome,
    limits: Limits,
    *,
    result: Mapping[str, Any] | None,
    error: str | None,
    wait: float,
    time: ColumnElement[float] | float | None = None,
) -> bool:
    """See `JobStore.finish`; `time` is when waiting starts, now by default."""
    if outcome is Outcome.LOST:
        raise ValueError("only `reclaim` sets the outcome lost")
    if not _end_attempts(connection, [token], outcome, error):
        # The reply to an earlier call may have been lost; repeating it with the same outcome succeeds.
        earlier = select(AttemptRow.outcome).where(AttemptRow.token == token)
        return connection.scalar(earlier) == str(outcome)
    failures = connection.scalars(select(JobRow.failures).where(*holding(token))).one()
    values = _after(outcome, failures, limits, wait, now() if time is None else time)
    if result is not None:
        values["result"] = dict(result)
    if error is not None or outcome is Outcome.SUCCEEDED:
        values["error"] = error
    changed = connection.execute(
        update(JobRow).where(*holding(token)).values(**values, updated_at=now()).returning(JobRow.id, JobRow.state)
    ).one()
    if changed.state in BADLY_ENDED:
        cancel_dependents(connection, [changed.id])
    return True


def finish_together(
    connection: Connection, tokens: Collection[str], outcome: Outcome, limits: Limits, *, error: str | None, wait: float
) -> frozenset[str]:
    """See `JobStore.finish_together`."""
    # The same time for all, so that waiting jobs become due together.
    time = connection.scalars(select(now())).one()
    return frozenset(
        token
        for token in sorted(tokens)
        if finish(connection, token, outcome, limits, result=None, error=error, wait=wait, time=time)
    )


def _after(
    outcome: Outcome, failures: int, limits: Limits, wait: float, time: ColumnElement[float] | float
) -> dict[str, Any]:
    """The changes of a job after an attempt with this outcome."""
    ended = {"token": None}
    if outcome is Outcome.SUCCEEDED:
        return {**ended, "state": str(JobState.SUCCEEDED)}
    if outcome is Outcome.FATAL:
        return {**ended, "state": str(JobState.FAILED), "failures": failures + 1}
    if outcome is Outcome.CANCELLED:
        return {**ended, "state": str(JobState.CANCELLED)}
    # Whatever goes back to the queue goes no further when a person wants it stopped.
    back = case((JobRow.cancel_requested, str(JobState.CANCELLED)), else_=str(JobState.QUEUED))
    if outcome is Outcome.PREEMPTED:
        return queued(state=back, preemptions=JobRow.preemptions + 1, not_before=time + wait)
    if outcome is Outcome.RETURNED:
        return queued(state=back, pack_id=None, not_before=time + wait)
    if outcome is Outcome.PAUSED:
        return queued(state=back, pack_id=None, held=~JobRow.cancel_requested)
    failures += 1
    if failures >= limits.failures:
        return {**ended, "state": str(JobState.FAILED), "failures": failures}
    return queued(state=back, failures=failures, not_before=time + max(wait, limits.wait_after(failures)))


def reclaim(connection: Connection, limits: Limits, *, host: str | None, alive: Collection[int]) -> list[Job]:
    """See `JobStore.reclaim`."""
    gone: ColumnElement[bool] = AttemptRow.lease_until < now()
    if host is not None:
        gone = or_(gone, and_(AttemptRow.host == host, ~one_of(AttemptRow.pid, alive)))
    # A row locked by a concurrent heartbeat or finish is not stale.
    stale = select(AttemptRow.token).where(AttemptRow.ended_at.is_(None), gone).with_for_update(skip_locked=True)
    tokens = connection.scalars(stale).all()
    if not tokens:
        return []
    _end_attempts(connection, tokens, Outcome.LOST, None)
    poison = and_(JobRow.lost + 1 >= limits.lost, ~JobRow.cancel_requested)
    returned = connection.scalars(
        update(JobRow)
        .where(JobRow.token.in_(tokens), JobRow.state.in_(HELD_STATES))
        .values(
            state=case(
                (JobRow.cancel_requested, str(JobState.CANCELLED)),
                (poison, str(JobState.FAILED)),
                else_=str(JobState.QUEUED),
            ),
            error=case((poison, f"the worker was lost {limits.lost} times while it held this job"), else_=JobRow.error),
            lost=JobRow.lost + 1,
            token=None,
            updated_at=now(),
        )
        .returning(JobRow.id)
    ).all()
    jobs = _rows(connection, returned)
    cancel_dependents(connection, [job.id for job in jobs if job.state in BADLY_ENDED])
    return jobs


def _end_attempts(connection: Connection, tokens: Collection[str], outcome: Outcome, error: str | None) -> int:
    ended = connection.execute(
        update(AttemptRow)
        .where(AttemptRow.token.in_(tokens), AttemptRow.ended_at.is_(None))
        .values(ended_at=now(), outcome=str(outcome), error=error)
    )
    return ended.rowcount


def change(connection: Connection, token: str, **values: Any) -> bool:
    """Change the job of a token; false if the token is no longer valid."""
    changed = connection.execute(update(JobRow).where(*holding(token)).values(**values, updated_at=now()))
    return changed.rowcount == 1


def assign_run(connection: Connection, job_id: int, run_id: str) -> bool:
    """See `JobStore.assign_run`."""
    changed = connection.execute(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.mlflow_run_id.is_(None))
        .values(mlflow_run_id=run_id, updated_at=now())
    )
    return changed.rowcount == 1


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
    requeued = requeue(connection, ids, dependents=True)
    cancel_unreachable(connection, requeued)
    return _rows(connection, {*ids, *requeued})


def forget(connection: Connection, ids: Collection[int], reason: str) -> list[Job]:
    """See `JobStore.forget`."""
    _lock(connection, ids)
    forgotten = connection.scalars(
        update(JobRow)
        .where(one_of(JobRow.id, ids), JobRow.state == str(JobState.SUCCEEDED))
        .values(
            state=str(JobState.CANCELLED),
            mlflow_run_id=None,
            result=None,
            checkpoint=0,
            error=reason,
            updated_at=now(),
        )
        .returning(JobRow.id)
    ).all()
    cancel_dependents(connection, forgotten)
    return _rows(connection, forgotten)


def settle(connection: Connection, promote: Collection[int], prune: Mapping[int, str]) -> list[Job]:
    """See `JobStore.settle`."""
    both = sorted(prune.keys() & set(promote))
    if both:
        raise ValueError(f"jobs {both} cannot be both promoted and pruned")
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
    """Lock rows in the order of their ids, like every other transaction."""
    connection.execute(select(JobRow.id).where(one_of(JobRow.id, ids)).order_by(JobRow.id).with_for_update()).all()


def _rows(connection: Connection, ids: Collection[int]) -> list[Job]:
    return [as_job(row) for row in connection.execute(job_columns().where(one_of(JobRow.id, ids)).order_by(JobRow.id))]


_FORGOTTEN_S = 86_400.0
"""Workers silent for longer are no longer listed."""


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
    """Seconds since a worker's last announcement."""
    return now() - WorkerRow.seen_at
