"""A sweep as a whole: when all of its jobs have ended it is compared, plotted, and the alias is set."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from rankwise.evaluation.compare import Comparison
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.loader import parse_experiment
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.space import SEARCHES
from rankwise.experiment.sweep import labelled_arms
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import JobStore
from rankwise.tasks.context import Context
from rankwise.tasks.halving import end_pruned_runs
from rankwise.tasks.payload import Work
from rankwise.tasks.report import publish_report
from rankwise.tasks.search import publish_history
from rankwise.tracking.leavings import open_sweeps

logger = logging.getLogger(__name__)
_PAGE = 1000
_UNFINISHED = (JobState.QUEUED, JobState.RUNNING, JobState.UPLOADING)


def begin_sweep(context: Context, parent_run_id: str) -> None:
    """Show that work on a sweep is under way. Needs no server now."""
    run = context.store.resume_run(parent_run_id, system_metrics=False)
    run.tags({"rankwise.reason": ""})
    run.leave(timeout=0.0)


def finish_sweep(
    context: Context,
    spec: ExperimentSpec,
    arms: Sequence[ArmSpec],
    parent_run_id: str,
    *,
    failed: int,
    command: str,
) -> Comparison:
    """Compare the arms, store the comparison in the sweep's run, set the alias, and end the run. May be repeated.

    Args:
        context: The stores.
        spec: The definition.
        arms: The sweep's arms.
        parent_run_id: The sweep's run.
        failed: How many of its jobs have failed.
        command: How to run it again, for the note.
    """
    end_pruned_runs(context, context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in arms]).values())
    parent = context.store.resume_run(parent_run_id, system_metrics=False, repeats=False, restart=False)
    try:
        comparison = publish_report(context, spec, arms, parent, command)
        if spec.sweep.method in SEARCHES:
            publish_history(context, spec, parent)
    except BaseException:
        parent.leave(timeout=0.0)
        raise
    parent.end("FAILED" if failed else "FINISHED", f"{failed} jobs failed" if failed else None)
    return comparison


def end_sweep(context: Context, parent_run_id: str, *, killed: bool, reason: str) -> None:
    """End the run of a sweep that was cut off."""
    parent = context.store.resume_run(parent_run_id, system_metrics=False, restart=False)
    parent.end("KILLED" if killed else "FAILED", reason, timeout=10)


def finish_complete(context: Context, jobs: Collection[Job]) -> list[str]:
    """Finish the sweeps of these jobs that have no work left, as the last worker of a sweep does; their run ids."""
    finished = []
    sweeps = {work.parent_run_id: work for work in (Work.of(job) for job in jobs if "parent_run_id" in job.spec)}
    for parent_run_id, work in sweeps.items():
        if any(_of_sweep(context.queue, work.experiment, parent_run_id, _UNFINISHED)):
            continue
        own = jobs_of_sweep(context.queue, work.experiment, parent_run_id)
        spec = parse_experiment(work.definition, f"the definition of {work.experiment}")
        failed = sum(job.state is JobState.FAILED for job in own)
        finish_sweep(context, spec, arms_of(spec, own), parent_run_id, failed=failed, command=work.command)
        context.voice.done(f"{work.experiment}: all jobs of the sweep have ended; rankwise compare {work.experiment}")
        finished.append(parent_run_id)
    return finished


def finish_open(context: Context, *, watched: str | None = None) -> tuple[str, ...]:
    """Finish the sweeps whose runs look open although all of their jobs have ended.

    Whoever did the last job was killed before it could, or met a tracking server that was away.

    Args:
        context: The stores.
        watched: The run of a sweep that another process has in hand.

    Returns:
        The run ids of the sweeps.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    finished = []
    for run_id, experiment in open_sweeps(context.store.client).items():
        if run_id == watched or context.store.is_open(run_id):
            continue
        own = islice(_of_sweep(context.queue, experiment, run_id), 1)
        try:
            finished += finish_complete(context, list(own))
        except ConfigError as error:  # Its definition is no longer one: the others are to be finished all the same.
            context.voice.warn(f"the sweep of {experiment} cannot be finished: {error}")
    return tuple(finished)


def arms_of(spec: ExperimentSpec, jobs: Collection[Job]) -> list[ArmSpec]:
    """The arms of a sweep: those of its definition, and those that were proposed while it ran."""
    arms = {arm.spec_hash: arm for _, arm in labelled_arms(spec)}
    for job in jobs:
        if job.kind is JobKind.TRAIN:
            arm = Work.of(job).arm
            arms.setdefault(arm.spec_hash, arm)
    return list(arms.values())


def jobs_of_sweep(
    queue: JobStore, experiment: str, parent_run_id: str, states: Collection[JobState] | None = None
) -> list[Job]:
    """The jobs that were submitted for a sweep, those of a search's later rounds too; of all states by default."""
    return list(_of_sweep(queue, experiment, parent_run_id, states))


def _of_sweep(
    queue: JobStore, experiment: str, parent_run_id: str, states: Collection[JobState] | None = None
) -> Iterator[Job]:
    return (job for job in _pages(queue, experiment, states) if job.spec.get("parent_run_id") == parent_run_id)


def _pages(queue: JobStore, experiment: str, states: Collection[JobState] | None) -> Iterator[Job]:
    last = 0
    while page := queue.jobs(experiment=experiment, states=states, limit=_PAGE, after_id=last):
        yield from page
        last = page[-1].id
