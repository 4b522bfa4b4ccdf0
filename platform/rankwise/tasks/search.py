"""A search in rounds: what is known of its arms, the arms of the next round, and its history.

The queue's rows are all that is remembered. Whoever sees the last arm of a round end submits the next one; two that
do so at once submit the same arms, of which the queue keeps one each.

What is known about the arms of a sweep is in their rows, so whoever finds the last of them at a rung decides, and a
decision that was lost with its process is made by the next one that looks. Two that decide at once say the same, and
the queue takes the first.

- Successive halving over the queue: arms pause at a rung, are compared once all of them are there, and go on or end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import ArmResult, Experiment, Round
from rankwise.experiment.halving import PRUNED, Competitor, Decision, Standing, decide, rungs
from rankwise.experiment.schema import EarlyStoppingSpec, ExperimentSpec, digest, greater_is_better
from rankwise.experiment.search import TrialState
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import every_job
from rankwise.report.history import History, HistoryTrial, history_page
from rankwise.tasks.context import Context, Work
from rankwise.tracking.run import Run

# Beyond any training: a rung behind an arm's end is never reached.
_FAR = 10**9


def stops_of(spec: ExperimentSpec, arms: Collection[ArmSpec]) -> tuple[int, ...]:
    """The steps after which each of these arms pauses, if it gets so far; the arms are compared with one another."""
    stopping = spec.sweep.early_stopping
    return () if stopping is None else rungs(stopping, _FAR, len({arm.configuration for arm in arms}))


def group_of(spec: ExperimentSpec, arms: Collection[ArmSpec]) -> str | None:
    """Names the arms that are compared with one another; None without early stopping.

    Other arms or other rungs are another group: what was pruned there is not pruned here.
    """
    stopping = spec.sweep.early_stopping
    if stopping is None:
        return None
    hashes = sorted(arm.spec_hash for arm in arms)
    return digest({"arms": hashes, "early_stopping": stopping.model_dump()})[:16]


def is_pruned(job: Job, group: str | None = None) -> bool:
    """Whether early stopping has ended this train job, and where a group is given, in that group."""
    pruned = job.state is JobState.CANCELLED and (job.error or "").startswith(PRUNED)
    return pruned and (group is None or job.spec.get("group") == group)


def paused_result(work: Work, steps: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """What the row of a paused job says. JSON has no NaN: what is no finite number is null."""
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    return {"steps": steps, "metrics": finite, "group": work.group}


def paused_at(job: Job) -> int:
    """The step at which the arm has paused, in the group that its row names now; 0 before the first rung."""
    result = job.result or {}
    return int(result.get("steps", 0)) if result.get("group") == job.spec.get("group") else 0


def settle_rungs(context: Context, jobs: Collection[Job]) -> list[Job]:
    """Decide about the groups of these jobs, so far as there is something to decide.

    The rows of those that are pruned end first, then their MLflow runs, with the reason.

    Returns:
        The jobs whose state has changed.
    """
    changed: list[Job] = []
    for group, work in _groups(jobs).items():
        members = list(_members(context, work.experiment, group))
        standings = {_standing(job) for job in members}
        if Standing.PAUSED not in standings or Standing.RUNNING in standings:
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
            _tell(context, work, stopping, decision)
        _end_runs(context, [job for job in moved if is_pruned(job)])
    return changed


def end_pruned_runs(context: Context, jobs: Collection[Job]) -> None:
    """End the runs of pruned jobs whose decision was cut off before it came to them. Asks the tracking server."""
    pruned = [job for job in jobs if is_pruned(job) and job.mlflow_run_id is not None]
    experiments = {str(job.spec["experiment_id"]) for job in pruned}
    ended = {
        run.run_id for each in experiments for run in context.store.runs(each, kind="train") if run.status == "KILLED"
    }
    _end_runs(context, [job for job in pruned if job.mlflow_run_id not in ended])


def _end_runs(context: Context, jobs: Collection[Job]) -> None:
    """Give runs their end, KILLED with the reason; what an arm has shown until then stays. Needs no server now."""
    for job in jobs:
        if job.mlflow_run_id is not None:
            run = context.store.resume_run(job.mlflow_run_id, system_metrics=False, repeats=False, restart=False)
            run.end("KILLED", job.error)


def competitor(stopping: EarlyStoppingSpec, job: Job) -> Competitor:
    """Where the arm of a train job stands."""
    step = paused_at(job)
    reached = sum(rung <= step for rung in rungs(stopping, _FAR)) - 1
    value = (job.result or {}).get("metrics", {}).get(stopping.metric) if reached >= 0 else None
    configuration = Work.of(job).arm.configuration
    return Competitor(
        spec_hash=job.spec_hash, configuration=configuration, standing=_standing(job), rung=reached, value=value
    )


def _standing(job: Job) -> Standing:
    match job.state:
        case JobState.SUCCEEDED:
            return Standing.FINISHED
        case JobState.FAILED:
            return Standing.FAILED
        case JobState.CANCELLED:
            return Standing.PRUNED if is_pruned(job) else Standing.FAILED
        case JobState.QUEUED if job.held:
            return Standing.PAUSED
    return Standing.RUNNING


def _groups(jobs: Collection[Job]) -> dict[str, Work]:
    """The groups of these jobs, each with what one of its rows says."""
    found: dict[str, Work] = {}
    for job in jobs:
        group = job.spec.get("group")
        if job.kind is JobKind.TRAIN and group is not None and group not in found:
            found[group] = Work.of(job)
    return found


def _members(context: Context, experiment: str, group: str) -> Iterator[Job]:
    jobs = every_job(context.queue, kinds=[JobKind.TRAIN], experiment=experiment)
    return (job for job in jobs if job.spec.get("group") == group)


def _tell(context: Context, work: Work, stopping: EarlyStoppingSpec, decision: Decision) -> None:
    step = rungs(stopping, _FAR)[decision.rung]
    kept, of = len(decision.promote), len(decision.promote) + len(decision.prune)
    context.voice.say(f"{work.experiment}: {kept} of {of} arms go on after step {step} (by {stopping.metric})")


@dataclass(frozen=True, kw_only=True)
class SweepArm:
    """An arm of a sweep as it is submitted.

    Attributes:
        label: What sets it apart.
        arm: The arm.
        group: The arms that it is compared with at rungs; None without early stopping.
        stops: The steps of these rungs.
        settled: Whether what came of it is used already: a later round of a search was proposed from it, so that it is
            left as it is, even if it has failed.
    """

    label: str
    arm: ArmSpec
    group: str | None
    stops: tuple[int, ...] = ()
    settled: bool = False


def arms_so_far(context: Context, experiment: Experiment) -> list[SweepArm]:
    """The arms of an experiment; of a search those of the rounds that have ended and of the next one."""
    spec = experiment.spec
    if experiment.is_search:
        parts = [part.arms for part in rounds_so_far(context, experiment)]
    else:
        parts = [experiment.labelled_arms]
    found: list[SweepArm] = []
    for number, part in enumerate(parts):
        arms = [arm for _, arm in part]
        group, stops = group_of(spec, arms), stops_of(spec, arms)
        settled = number < len(parts) - 1
        found += [SweepArm(label=label, arm=arm, group=group, stops=stops, settled=settled) for label, arm in part]
    return found


def rounds_so_far(context: Context, experiment: Experiment) -> tuple[Round, ...]:
    """The rounds of a search that have ended, and the next one; of random draws, all in one."""
    return experiment.rounds(lambda arms: results_of(context, experiment.spec, arms))


def results_of(context: Context, spec: ExperimentSpec, arms: Sequence[ArmSpec]) -> dict[str, ArmResult]:
    """What the queue knows about the arms of one round that have ended, by spec hash."""
    group = group_of(spec, arms)
    trains = context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in arms])
    evaluations = context.queue.find(JobKind.EVALUATE, [arm.eval_hash() for arm in arms])
    found = {}
    for arm in arms:
        train, evaluation = trains.get(arm.spec_hash), evaluations.get(arm.eval_hash())
        if train is not None and (result := _result(spec, group, train, evaluation)) is not None:
            found[arm.spec_hash] = result
    return found


def _result(spec: ExperimentSpec, group: str | None, train: Job, evaluation: Job | None) -> ArmResult | None:
    if is_pruned(train):
        # What another sweep has pruned is trained again in this one.
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
    """Only the primary metric can be set beside the results of complete arms."""
    value = (train.result or {}).get("metrics", {}).get(spec.evaluation.primary_metric)
    if value is None:
        return ArmResult(state=TrialState.PRUNED)
    return ArmResult(state=TrialState.PRUNED, step=paused_at(train), at_step=value)


def _value(evaluation: Job, key: str) -> float | None:
    metrics: Mapping[str, Mapping[str, float | None]] = (evaluation.result or {}).get("metrics", {})
    return metrics.get(key, {}).get("value")


def publish_history(context: Context, experiment: Experiment, parent: Run) -> None:
    """Store the history with the sweep's run: a table, a plot, and the best value after each trial as a curve."""
    found = history(context, experiment)
    wanted = experiment.spec.sweep.trials
    if wanted is not None and len(found.trials) < wanted:
        tried = len(found.trials)
        context.voice.warn(f"{found.experiment}: {tried} of {wanted} arms: no further point was found that differs")
    parent.json(found.to_json(), "search/history.json")
    parent.text(history_page(found), "search/history.html")
    for number, best in enumerate(found.best_so_far):
        if best is not None:
            parent.metric("search.best_so_far", best, number)


def history(context: Context, experiment: Experiment) -> History:
    """All trials of a search so far."""
    spec = experiment.spec
    found = rounds_so_far(context, experiment)
    trials: list[HistoryTrial] = []
    for each in found:
        arms = [arm for _, arm in each.arms]
        results = results_of(context, spec, arms)
        trains = context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in arms])
        for (label, arm), values in zip(each.arms, each.values, strict=True):
            result, train = results.get(arm.spec_hash), trains.get(arm.spec_hash)
            trials.append(
                HistoryTrial(
                    number=len(trials),
                    round=each.number,
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
        rejected=sum(each.rejected for each in found),
    )
