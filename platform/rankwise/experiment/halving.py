"""Successive halving: which arms continue at a rung, and what a sweep with rungs costs.

1. All arms are trained to the first rung (`min_steps`) and compared there.
2. One in `eta` configurations continues to the next rung, which is `eta` times as far.

Method: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016. It is
synchronous: a decision waits until every remaining arm has reached the rung or its end, so it depends on results alone
and not on the speed of workers. (The asynchronous form of Li et al., "A System for Massively Parallel Hyperparameter
Tuning", 2020, keeps more workers busy but promotes arms that a later one would have displaced.)

Configurations are compared, not arms: arms that differ only in the seed continue or stop together, by their mean.
Comparing arm by arm would select lucky seeds and lose the error bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rankwise.experiment.metric_names import greater_is_better
from rankwise.experiment.schema import EarlyStoppingSpec

PRUNED = "pruned at step"
"""The start of every pruning reason; it distinguishes pruned arms from cancelled ones."""


class ArmStanding(StrEnum):
    """The state of an arm in a sweep with rungs."""

    RUNNING = "running"
    """Training towards its next rung or its end, or waiting for a worker."""
    PAUSED = "paused"
    """Waiting at a rung for the other arms."""
    FINISHED = "finished"
    """Trained to the end."""
    FAILED = "failed"
    """Ended without a result: non-finite loss, too many failures, or cancelled by a user."""
    PRUNED = "pruned"
    """Stopped by an earlier decision."""


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """One arm of a sweep.

    `configuration` is shared by arms that differ only in the seed. `rung` is the last rung reached, counted from 0 and
    -1 before the first; `value` is the metric there.
    """

    spec_hash: str
    configuration: str
    standing: ArmStanding
    rung: int = -1
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class RungDecision:
    """Which arms continue at a rung, counted from 0.

    `promote` holds the spec hashes of arms that continue, best configuration first; `prune` maps the others to their
    reason.
    """

    rung: int
    promote: tuple[str, ...]
    prune: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class PlannedRung:
    """A planned rung: `arms` are expected to reach it, `kept` of them to continue."""

    step: int
    arms: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Optimizer steps of a sweep with rungs: `expected` if no arm fails, `upper` without early stopping."""

    rungs: tuple[PlannedRung, ...]
    expected: int
    upper: int


def rungs(stopping: EarlyStoppingSpec, total_steps: int, configurations: int | None = None) -> tuple[int, ...]:
    """The rungs of an arm of `total_steps` steps, in steps; the end is not a rung.

    With the number of configurations, rungs that could prune nothing are left out too.
    """
    steps = []
    step, left = stopping.min_steps, configurations
    while step < total_steps and (left is None or left > stopping.finalists):
        steps.append(step)
        step *= stopping.eta
        left = None if left is None else kept(stopping, left)
    return tuple(steps)


def kept(stopping: EarlyStoppingSpec, configurations: int) -> int:
    """How many of the configurations continue at a rung."""
    return min(configurations, max(stopping.finalists, configurations // stopping.eta))


def decide(stopping: EarlyStoppingSpec, competitors: Sequence[Competitor]) -> RungDecision | None:
    """Decide which arms continue, or return None while there is nothing to decide.

    Of the configurations promoted to this rung, failures included, one in `eta` continues, at least `finalists`. An arm
    whose value is not finite never continues. An arm cancelled at a rung counts as a failure there, not at the next. A
    configuration's value is the mean over its seeds with a value; ties are ordered by configuration hash. An arm that
    ends before the rung is excluded, but the others wait for it to end.
    """
    paused = [arm for arm in competitors if arm.standing is ArmStanding.PAUSED]
    if not paused or any(arm.standing is ArmStanding.RUNNING for arm in competitors):
        return None
    rung = min(arm.rung for arm in paused)
    here = [arm for arm in paused if arm.rung == rung]
    failed = [arm for arm in competitors if arm.standing is ArmStanding.FAILED and arm.rung in (rung - 1, rung)]
    present = len({arm.configuration for arm in here})
    # An arm that failed after the previous rung looks like one cancelled at it, so cap at the number promoted.
    entered = min(len({arm.configuration for arm in [*here, *failed]}), _promoted(stopping, competitors, rung))
    promoted = kept(stopping, max(present, entered))
    ranking = _ranked(here, greater=greater_is_better(stopping.metric))
    reason = f"{PRUNED} {stopping.min_steps * stopping.eta**rung}: {stopping.metric}"
    better = f"is not among the best {len(ranking[:promoted])} of {present}"
    prune = {arm.spec_hash: f"{reason} is not a finite number" for arm in here if not _has_value(arm)}
    for arms in ranking[promoted:]:
        value = f"{_mean(arms):.4g}" if len(arms) == 1 else f"{_mean(arms):.4g}, the mean over {len(arms)} seeds,"
        prune |= {arm.spec_hash: f"{reason} {value} {better}" for arm in arms}
    promote = tuple(arm.spec_hash for arms in ranking[:promoted] for arm in arms)
    return RungDecision(rung=rung, promote=promote, prune=prune)


def _promoted(stopping: EarlyStoppingSpec, competitors: Sequence[Competitor], rung: int) -> int:
    """The maximum number of configurations that were promoted to a rung."""
    entered = [arm for arm in competitors if arm.standing is not ArmStanding.FINISHED or arm.rung >= 0]
    count = len({arm.configuration for arm in entered})
    for _ in range(rung):
        count = kept(stopping, count)
    return count


def _ranked(here: Sequence[Competitor], *, greater: bool) -> list[list[Competitor]]:
    """Arms with a value, grouped by configuration, best first."""
    groups: dict[str, list[Competitor]] = {}
    for arm in sorted(here, key=lambda arm: arm.spec_hash):
        if _has_value(arm):
            groups.setdefault(arm.configuration, []).append(arm)
    sign = -1 if greater else 1
    return sorted(groups.values(), key=lambda arms: (sign * _mean(arms), arms[0].configuration))


def _has_value(arm: Competitor) -> bool:
    return arm.value is not None and math.isfinite(arm.value)


def _mean(arms: Sequence[Competitor]) -> float:
    return math.fsum(arm.value for arm in arms if arm.value is not None) / len(arms)


def budget(stopping: EarlyStoppingSpec, configurations: Sequence[Sequence[int]]) -> Budget:
    """Estimate the steps of a sweep with rungs, assuming that every configuration is equally likely to continue.

    `configurations` holds, for each configuration, the steps of its arms (one per seed).
    """
    totals = [total for arms in configurations for total in arms]
    share = 1.0
    planned: list[PlannedRung] = []
    expected = 0.0
    before = 0
    for step in rungs(stopping, max(totals, default=0), len(configurations)):
        expected += share * sum(min(total, step) - before for total in totals if total > before)
        count = max(1, round(share * sum(max(arms, default=0) > step for arms in configurations)))
        part = kept(stopping, count) / count
        arms = max(1, round(share * sum(total > step for total in totals)))
        planned.append(PlannedRung(step=step, arms=arms, kept=max(1, round(arms * part))))
        share *= part
        before = step
    expected += share * sum(total - before for total in totals if total > before)
    return Budget(rungs=tuple(planned), expected=round(expected), upper=sum(totals))
