"""The next round of a search, submitted by whoever sees the one before end."""

from __future__ import annotations

from collections.abc import Collection

from rankwise.evaluation.history import History
from rankwise.experiment.loader import parse_experiment
from rankwise.experiment.sweep import is_search, planned_rounds
from rankwise.jobs.job import Job, JobKind
from rankwise.tasks.context import Context
from rankwise.tasks.enqueue import queue_arms
from rankwise.tasks.payload import Work
from rankwise.tasks.search import arms_so_far, history


def submit_next(context: Context, jobs: Collection[Job]) -> list[Job]:
    """Queue the next round of each search that these jobs belong to, where the one before has ended.

    Returns:
        All jobs of these searches, those of earlier rounds too: another worker may have submitted the next one.
    """
    found: list[Job] = []
    for work, priority in _sweeps(jobs):
        spec = parse_experiment(work.definition, f"the definition of {work.experiment}")
        if not is_search(spec):
            continue
        arms = arms_so_far(context, spec)
        trains = context.queue.find(JobKind.TRAIN, [each.arm.spec_hash for each in arms])
        evaluations = context.queue.find(JobKind.EVALUATE, [each.arm.eval_hash() for each in arms])
        new = [
            each
            for each in arms
            # Without its evaluation an arm was submitted by a process that died half-way.
            if not each.settled and (each.arm.spec_hash not in trains or each.arm.eval_hash() not in evaluations)
        ]
        if new:
            context.voice.say(_told(history(context, spec), len(planned_rounds(spec)), len(new)))
            found += queue_arms(context, work, new, priority=priority)
        found += [*trains.values(), *evaluations.values()]
    return found


def _told(found: History, rounds: int, new: int) -> str:
    """Which round begins, from how many arms it was proposed, and the best of them."""
    number = found.trials[-1].round
    ended = sum(trial.round < number for trial in found.trials)
    text = f"{found.experiment}: round {number + 1} of {rounds}: {new} arms, proposed from {ended} that have ended"
    best = found.best_so_far[-1]
    if best is None:
        return text
    trial = next(trial for trial in found.trials if trial.state == "complete" and trial.value == best)
    return f"{text}; best so far {found.primary_metric} {best:.4g} with {trial.label}"


def _sweeps(jobs: Collection[Job]) -> list[tuple[Work, int]]:
    """The work of one job of each sweep, and its priority."""
    found: dict[str, tuple[Work, int]] = {}
    for job in jobs:
        if "parent_run_id" in job.spec and job.spec["parent_run_id"] not in found:
            found[job.spec["parent_run_id"]] = Work.of(job), job.priority
    return list(found.values())
