"""Arms into the queue: training, evaluation after it, the bare base, and the runs that show what is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.tasks.context import Context
from rankwise.tasks.halving import is_pruned
from rankwise.tasks.link import link_done
from rankwise.tasks.payload import Work
from rankwise.tasks.search import SweepArm
from rankwise.tracking.descriptions import arm_note
from rankwise.tracking.provenance import collect
from rankwise.tracking.registry import JOB

_AHEAD = 16
"""As many as a worker claims together."""


def queue_arms(
    context: Context, any_work: Work, arms: Sequence[SweepArm], *, priority: int = 0, after: Sequence[int] = ()
) -> list[Job]:
    """Queue what is missing of some arms of a sweep: training, evaluation after it, and the bare base.

    What was decided about an arm stays decided: one that was pruned in this sweep, and one from which a later round was
    proposed, is not tried again.

    Args:
        context: The stores.
        any_work: The work of any arm of the sweep: what its rows have in common.
        arms: The arms.
        priority: The higher one is claimed first.
        after: Jobs that must have succeeded first.

    Returns:
        All jobs of these arms, as they now stand.
    """
    works = [
        replace(
            any_work,
            arm=each.arm,
            bare=False,
            run_name=each.label or f"arm {each.arm.short}",
            stops=each.stops,
            group=each.group,
        )
        for each in arms
    ]
    known = context.queue.find(JobKind.TRAIN, [each.arm.spec_hash for each in arms])
    left = {each.arm.spec_hash for each in arms if _is_decided(each, known.get(each.arm.spec_hash))}
    open_works = [work for work in works if work.arm.spec_hash not in left]
    submitted = context.queue.submit(
        [work.train_job(priority=priority, after=tuple(after)) for work in open_works], again=True
    )
    trains = {**known, **{job.spec_hash: job for job in submitted}}
    _schedule(context, any_work.experiment_id, [(work, trains[work.arm.spec_hash]) for work in open_works])
    bare = {
        each.arm.base_eval_hash(): replace(
            any_work, arm=each.arm, bare=True, run_name="base alone", stops=(), group=None
        )
        for each in arms
    }
    evaluate = [work.evaluate_job(tuple(after), priority=priority) for work in bare.values()]
    evaluate += [work.evaluate_job(after=(trains[work.arm.spec_hash].id,), priority=priority) for work in open_works]
    evaluations = context.queue.submit(evaluate, again=True)
    ended = context.queue.find(JobKind.EVALUATE, [work.arm.eval_hash() for work in works if work.arm.spec_hash in left])
    evaluations += ended.values()
    pairs = [(work, trains[work.arm.spec_hash]) for work in works]
    link_done(context, pairs, evaluations)
    ids = [*(train.id for _, train in pairs), *(evaluation.id for evaluation in evaluations)]
    # Once more: since then the runs have been noted, and a worker may have begun.
    stand = {job.id: job for job in context.queue.jobs(ids=ids)}
    return [stand[each] for each in ids]


def all_done(context: Context, arms: Sequence[SweepArm]) -> bool:
    """Whether nothing of these arms is left to do."""
    trains = context.queue.find(JobKind.TRAIN, [each.arm.spec_hash for each in arms])
    hashes = [*(each.arm.eval_hash() for each in arms), *{each.arm.base_eval_hash() for each in arms}]
    evaluations = context.queue.find(JobKind.EVALUATE, hashes)
    ended = {
        each.arm.eval_hash()
        for each in arms
        if (train := trains.get(each.arm.spec_hash)) is not None and _is_pruned_here(each, train)
    }
    ended |= {value for value, job in evaluations.items() if job.state is JobState.SUCCEEDED}
    return ended.issuperset(hashes)


def _is_decided(each: SweepArm, train: Job | None) -> bool:
    return train is not None and (each.settled or _is_pruned_here(each, train))


def _is_pruned_here(each: SweepArm, train: Job) -> bool:
    """Whether early stopping has ended the arm in this sweep; what another sweep has pruned is trained here."""
    return each.group is not None and is_pruned(train, each.group)


def _schedule(context: Context, experiment_id: str, pairs: Sequence[tuple[Work, Job]]) -> None:
    """Make the runs of the arms that are claimed first, so that a server that is away then keeps nobody waiting.

    A run takes MLflow a good part of a second: the others are made when their arm is claimed. `compare` has those from
    the queue.
    """
    queued = [(work, job) for work, job in pairs if job.state is JobState.QUEUED]
    waiting = [(work, job) for work, job in queued if job.mlflow_run_id is None]
    waiting = waiting[: max(0, _AHEAD - (len(queued) - len(waiting)))]
    if not waiting:
        return
    provenance = collect().tags()
    scheduled = context.store.find_scheduled(experiment_id)
    for work, job in waiting:
        if job.id in scheduled:
            context.queue.assign_run(job.id, scheduled[job.id])
            continue
        run = context.store.start_run(
            experiment_id,
            work.run_name,
            parent=work.parent_run_id,
            params=work.arm.params,
            tags={**provenance, JOB: job.id},
            description=arm_note(work.arm),
            kind="train",
            spec_hash=work.arm.spec_hash,
            status="SCHEDULED",
        )
        if context.queue.assign_run(job.id, run.run_id):
            run.leave(timeout=0.0)
        else:
            run.end("KILLED", "a worker has begun this arm in a run of its own", timeout=0.0)
