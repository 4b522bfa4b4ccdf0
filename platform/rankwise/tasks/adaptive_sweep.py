"""Adaptive sweeps: rounds of a search and early stopping (successive halving), both derived from the queue's rows.

Seeds on demand (`answer_seeds`) are queued in the same way. Nothing else is stored. Any worker that sees the last arm
of a round end submits the next round, and any worker that sees the last arm of a group pause decides who continues.
Concurrent workers derive the same arms and the same decision; the queue keeps one of each. A decision lost in a crash
is made again by the next worker.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import ArmResult, Experiment, SearchRound
from rankwise.experiment.halving import PRUNED, ArmStanding, Competitor, RungDecision, decide, rungs
from rankwise.experiment.hashing import digest
from rankwise.experiment.metric_names import greater_is_better
from rankwise.experiment.schema import EarlyStoppingSpec, ExperimentSpec
from rankwise.experiment.search import TrialState
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import every_job
from rankwise.report.history import History, HistoryTrial, history_page
from rankwise.tasks.answer_seeds import stages_so_far
from rankwise.tasks.context import ArmWork, Context
from rankwise.tracking.run import Run

# More steps than any training: rungs beyond an arm's end are never reached.
_FAR = 10**9


def stops_of(spec: ExperimentSpec, arms: Collection[ArmSpec]) -> tuple[int, ...]:
    """Steps at which these arms, which are compared with each other, pause if they train that long."""
    stopping = spec.sweep.early_stopping
    return () if stopping is None else rungs(stopping, _FAR, len({arm.configuration for arm in arms}))


def group_of(spec: ExperimentSpec, arms: Collection[ArmSpec]) -> str | None:
    """ID of the group of arms that are compared with each other; None without early stopping.

    Other arms or rungs form another group: an arm that was pruned there is not pruned here.
    """
    stopping = spec.sweep.early_stopping
    if stopping is None:
        return None
    hashes = sorted(arm.spec_hash for arm in arms)
    return digest({"arms": hashes, "early_stopping": stopping.model_dump()})[:16]


def is_pruned(job: Job, group: str | None = None) -> bool:
    """Whether early stopping ended this train job, in `group` if given."""
    pruned = job.state is JobState.CANCELLED and (job.error or "").startswith(PRUNED)
    return pruned and (group is None or job.spec.get("group") == group)


def paused_result(work: ArmWork, steps: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Result of a paused job. JSON has no NaN, so non-finite numbers become null."""
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    return {"steps": steps, "metrics": finite, "group": work.group}


def paused_at(job: Job) -> int:
    """Step at which the arm paused in its current group; 0 before the first rung."""
    result = job.result or {}
    return int(result.get("steps", 0)) if result.get("group") == job.spec.get("group") else 0


def settle_rungs(context: Context, jobs: Collection[Job]) -> list[Job]:
    """Decide the groups of these jobs whose arms have all paused or ended; returns the changed jobs."""
    changed: list[Job] = []
    for group, work in _groups(jobs).items():
        members = list(_members(context, work.experiment, group))
        standings = {_standing(job) for job in members}
        if ArmStanding.PAUSED not in standings or ArmStanding.RUNNING in standings:
            continue
        stopping = context.experiment_of(work).spec.sweep.early_stopping
        assert stopping is not None, "a job of a group has a definition with early stopping"
        decision = decide(stopping, [competitor(stopping, job) for job in members])
        if decision is None:
            continue
        ids = {job.spec_hash: job.id for job in members}
        prune = {ids[spec_hash]: reason for spec_hash, reason in decision.prune.items()}
        moved = context.queue.settle([ids[spec_hash] for spec_hash in decision.promote], prune)
        changed += moved
        if moved:
            _report_decision(context, work, stopping, decision)
        _end_runs(context, [job for job in moved if is_pruned(job)])
    return changed


def end_pruned_runs(context: Context, jobs: Collection[Job]) -> None:
    """End runs of pruned jobs that a crash left open. Needs the tracking server."""
    pruned = [job for job in jobs if is_pruned(job) and job.mlflow_run_id is not None]
    experiments = {str(job.spec["experiment_id"]) for job in pruned}
    ended = {
        run.run_id
        for experiment in experiments
        for run in context.store.runs(experiment, kind="train")
        if run.status == "KILLED"
    }
    _end_runs(context, [job for job in pruned if job.mlflow_run_id not in ended])


def _end_runs(context: Context, jobs: Collection[Job]) -> None:
    """End runs as KILLED with the reason; their metrics stay. Works without the server."""
    for job in jobs:
        if job.mlflow_run_id is not None:
            run = context.store.resume_run(job.mlflow_run_id, system_metrics=False, repeats=False, restart=False)
            run.end("KILLED", job.error)


def competitor(stopping: EarlyStoppingSpec, job: Job) -> Competitor:
    """State of a train job's arm at its last rung."""
    step = paused_at(job)
    reached = sum(rung <= step for rung in rungs(stopping, _FAR)) - 1
    value = (job.result or {}).get("metrics", {}).get(stopping.metric) if reached >= 0 else None
    configuration = ArmWork.of(job).arm.configuration
    return Competitor(
        spec_hash=job.spec_hash, configuration=configuration, standing=_standing(job), rung=reached, value=value
    )


def _standing(job: Job) -> ArmStanding:
    match job.state:
        case JobState.SUCCEEDED:
            return ArmStanding.FINISHED
        case JobState.FAILED:
            return ArmStanding.FAILED
        case JobState.CANCELLED:
            return ArmStanding.PRUNED if is_pruned(job) else ArmStanding.FAILED
        case JobState.QUEUED if job.held:
            return ArmStanding.PAUSED
    return ArmStanding.RUNNING


def _groups(jobs: Collection[Job]) -> dict[str, ArmWork]:
    works: dict[str, ArmWork] = {}
    for job in jobs:
        group = job.spec.get("group")
        if job.kind is JobKind.TRAIN and group is not None and group not in works:
            works[group] = ArmWork.of(job)
    return works


def _members(context: Context, experiment: str, group: str) -> Iterator[Job]:
    jobs = every_job(context.queue, kinds=[JobKind.TRAIN], experiment=experiment)
    return (job for job in jobs if job.spec.get("group") == group)


def _report_decision(context: Context, work: ArmWork, stopping: EarlyStoppingSpec, decision: RungDecision) -> None:
    step = rungs(stopping, _FAR)[decision.rung]
    kept, total = len(decision.promote), len(decision.promote) + len(decision.prune)
    context.reporter.say(f"{work.experiment}: {kept} of {total} arms continue after step {step} (by {stopping.metric})")


@dataclass(frozen=True, kw_only=True)
class SweepArm:
    """An arm of a sweep as it is submitted, with the group and rungs that it is compared in.

    `settled`: a later round was proposed from its result, so that it is not retried even if it failed.
    """

    label: str
    arm: ArmSpec
    group: str | None
    stops: tuple[int, ...] = ()
    settled: bool = False


def arms_so_far(context: Context, experiment: Experiment, *, more_seeds: bool = True) -> list[SweepArm]:
    """The arms of an experiment; for a search, those of ended rounds and of the next one.

    With seeds on demand, those of ended stages and of the next one; the last stage only if `more_seeds`.

    Raises:
        TrackingError: Seeds on demand depend on results that cannot be read.
    """
    spec = experiment.spec
    stages = stages_so_far(context, experiment, more_seeds=more_seeds)
    if experiment.is_search:
        parts = [part.arms for part in rounds_so_far(context, experiment)]
    elif stages is not None:
        parts = [stage.arms for stage in stages]
    else:
        parts = [experiment.labelled_arms]
    sweep_arms: list[SweepArm] = []
    for number, part in enumerate(parts):
        arms = [arm for _, arm in part]
        group, stops = group_of(spec, arms), stops_of(spec, arms)
        settled = number < len(parts) - 1
        sweep_arms += [SweepArm(label=label, arm=arm, group=group, stops=stops, settled=settled) for label, arm in part]
    return sweep_arms


def rounds_so_far(context: Context, experiment: Experiment) -> tuple[SearchRound, ...]:
    """The ended rounds of a search and the next one. Random search has a single round."""
    return experiment.rounds(lambda arms: results_of(context, experiment.spec, arms))


def results_of(context: Context, spec: ExperimentSpec, arms: Sequence[ArmSpec]) -> dict[str, ArmResult]:
    """Results of the arms of one round that have ended, by spec hash."""
    group = group_of(spec, arms)
    trains = context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in arms])
    evaluations = context.queue.find(JobKind.EVALUATE, [arm.eval_hash() for arm in arms])
    results = {}
    for arm in arms:
        train, evaluation = trains.get(arm.spec_hash), evaluations.get(arm.eval_hash())
        if train is not None and (result := _result(spec, group, train, evaluation)) is not None:
            results[arm.spec_hash] = result
    return results


def _result(spec: ExperimentSpec, group: str | None, train: Job, evaluation: Job | None) -> ArmResult | None:
    if is_pruned(train):
        # An arm that another sweep pruned is trained again in this one.
        return _pruned(spec, train) if is_pruned(train, group) else None
    if train.state is JobState.FAILED:
        return ArmResult(state=TrialState.PRUNED)
    if train.state is JobState.CANCELLED:
        return ArmResult(state=TrialState.UNKNOWN)
    if evaluation is None or not evaluation.ended:
        return None
    value = _value(evaluation, spec.evaluation.primary_metric)
    if evaluation.state is not JobState.SUCCEEDED or value is None or not math.isfinite(value):
        return ArmResult(state=TrialState.UNKNOWN)
    return ArmResult(state=TrialState.COMPLETE, value=value)


def _pruned(spec: ExperimentSpec, train: Job) -> ArmResult:
    """Only the primary metric is comparable with results of complete arms."""
    value = (train.result or {}).get("metrics", {}).get(spec.evaluation.primary_metric)
    if value is None:
        return ArmResult(state=TrialState.PRUNED)
    return ArmResult(state=TrialState.PRUNED, step=paused_at(train), at_step=value)


def _value(evaluation: Job, key: str) -> float | None:
    metrics: Mapping[str, Mapping[str, float | None]] = (evaluation.result or {}).get("metrics", {})
    return metrics.get(key, {}).get("value")


def publish_history(context: Context, experiment: Experiment, parent: Run) -> None:
    """Store the search history in the sweep's run: JSON, plot, and the best value so far as a curve."""
    record = history(context, experiment)
    planned = experiment.spec.sweep.trials
    if planned is not None and len(record.trials) < planned:
        tried = len(record.trials)
        context.reporter.warn(
            f"{record.experiment}: only {tried} of {planned} arms: the search found no further distinct point"
        )
    parent.json(record.to_json(), "search/history.json")
    parent.text(history_page(record), "search/history.html")
    for number, best in enumerate(record.best_so_far):
        if best is not None:
            parent.metric("search.best_so_far", best, number)


def history(context: Context, experiment: Experiment) -> History:
    """All trials of a search so far."""
    spec = experiment.spec
    rounds = rounds_so_far(context, experiment)
    trials: list[HistoryTrial] = []
    for search_round in rounds:
        arms = [arm for _, arm in search_round.arms]
        results = results_of(context, spec, arms)
        trains = context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in arms])
        for (label, arm), values in zip(search_round.arms, search_round.values, strict=True):
            result, train = results.get(arm.spec_hash), trains.get(arm.spec_hash)
            trials.append(
                HistoryTrial(
                    number=len(trials),
                    round=search_round.number,
                    spec_hash=arm.spec_hash,
                    label=label,
                    values=values,
                    state="waiting" if result is None else str(result.state),
                    value=None if result is None else result.value if result.step is None else result.at_step,
                    step=None if result is None else result.step,
                    run_id=None if train is None else train.mlflow_run_id,
                )
            )
    primary = spec.evaluation.primary_metric
    return History(
        experiment=spec.name,
        method=spec.sweep.method,
        primary_metric=primary,
        greater_is_better=greater_is_better(primary),
        trials=tuple(trials),
        rejected=sum(search_round.rejected for search_round in rounds),
    )
