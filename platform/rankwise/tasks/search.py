"""A search in rounds: what is known of its arms, the arms of the next round, and its history.

The queue's rows are all that is remembered. Whoever sees the last arm of a round end submits the next one; two that
do so at once submit the same arms, of which the queue keeps one each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankwise.evaluation.history import History, HistoryTrial, history_page
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.metric_names import greater_is_better
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.search import TrialState
from rankwise.experiment.sweep import ArmResult, Round, is_search, labelled_arms, rounds
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.tasks.context import Context
from rankwise.tasks.halving import group_of, is_pruned, paused_at, stops_of
from rankwise.tracking.runs import Run


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


def arms_so_far(context: Context, spec: ExperimentSpec) -> list[SweepArm]:
    """The arms of a definition; of a search those of the rounds that have ended and of the next one."""
    parts = [each.arms for each in rounds_so_far(context, spec)] if is_search(spec) else [labelled_arms(spec)]
    found: list[SweepArm] = []
    for number, part in enumerate(parts):
        arms = [arm for _, arm in part]
        group, stops = group_of(spec, arms), stops_of(spec, arms)
        settled = number < len(parts) - 1
        found += [SweepArm(label=label, arm=arm, group=group, stops=stops, settled=settled) for label, arm in part]
    return found


def rounds_so_far(context: Context, spec: ExperimentSpec) -> tuple[Round, ...]:
    """The rounds of a search that have ended, and the next one; of random draws, all in one."""
    return rounds(spec, lambda arms: results_of(context, spec, arms))


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


def publish_history(context: Context, spec: ExperimentSpec, parent: Run) -> None:
    """Store the history with the sweep's run: a table, a plot, and the best value after each trial as a curve."""
    found = history(context, spec)
    wanted = spec.sweep.trials
    if wanted is not None and len(found.trials) < wanted:
        tried = len(found.trials)
        context.voice.warn(f"{spec.name}: {tried} of {wanted} arms: no further point was found that differs")
    parent.json(found.to_json(), "search/history.json")
    parent.text(history_page(found), "search/history.html")
    for number, best in enumerate(found.best_so_far):
        if best is not None:
            parent.metric("search.best_so_far", best, number)


def history(context: Context, spec: ExperimentSpec) -> History:
    """All trials of a search so far."""
    found = rounds_so_far(context, spec)
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
