"""Successive halving: who goes on at a rung, and what a sweep with rungs costs.

Arms are trained to the first rung (`min_steps`), compared there, and of `eta` configurations one goes on to the next
rung, which is `eta` times as far (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", 2016). It is synchronous: nothing is decided before every living arm has reached the rung or its end, so
that the decision depends on results alone, and not on which worker was the faster one. (The asynchronous form of Li et
al., "A System for Massively Parallel Hyperparameter Tuning", 2020, promotes before all are there; it keeps many workers
busy, and promotes arms that a later one would have pushed out.)

What is compared are configurations, as in the comparison after the sweep: arms that differ in nothing but the seed go
on or end together, by the mean over them. Arm by arm, the luckiest seeds would be kept, and the error bars lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rankwise.experiment.schema import EarlyStoppingSpec, greater_is_better

PRUNED = "pruned at step"
"""How every reason begins, by which a pruned arm is told from one that a person cancelled."""


class Standing(StrEnum):
    """Where an arm stands."""

    RUNNING = "running"
    """On its way to its next rung or its end, or waiting for a worker."""
    PAUSED = "paused"
    """At a rung, waiting for the others."""
    FINISHED = "finished"
    """Trained to its end."""
    FAILED = "failed"
    """Ended without a result: a loss that is not finite, too many failures, cancelled by a person."""
    PRUNED = "pruned"
    """Stopped by an earlier decision."""


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """One arm of a sweep.

    Attributes:
        spec_hash: The arm.
        configuration: What it shares with the arms that differ from it in the seed only.
        standing: Where it stands.
        rung: The last rung that it has reached, counted from 0; -1 before the first.
        value: The metric there; None before the first.
    """

    spec_hash: str
    configuration: str
    standing: Standing
    rung: int = -1
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What follows at a rung.

    Attributes:
        rung: Which, counted from 0.
        promote: Spec hashes of the arms that go on, those of the best configuration first.
        prune: The others, each with its reason.
    """

    rung: int
    promote: tuple[str, ...]
    prune: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class PlannedRung:
    """A rung of a plan: `arms` are expected there, `kept` of them go on."""

    step: int
    arms: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Optimizer steps of a sweep with rungs.

    Attributes:
        rungs: What is expected at each.
        expected: Steps when no arm fails.
        upper: Steps without early stopping.
    """

    rungs: tuple[PlannedRung, ...]
    expected: int
    upper: int


def rungs(stopping: EarlyStoppingSpec, total_steps: int, configurations: int | None = None) -> tuple[int, ...]:
    """The steps after which an arm of `total_steps` steps is compared; its end is none.

    With the number of configurations that are compared, a rung at which nobody could be left out is none either:
    whoever is alone does not stop any more.
    """
    steps = []
    step, left = stopping.min_steps, configurations
    while step < total_steps and (left is None or left > stopping.finalists):
        steps.append(step)
        step *= stopping.eta
        left = None if left is None else kept(stopping, left)
    return tuple(steps)


def kept(stopping: EarlyStoppingSpec, configurations: int) -> int:
    """Of so many configurations, how many go on."""
    return min(configurations, max(stopping.finalists, configurations // stopping.eta))


def decide(stopping: EarlyStoppingSpec, competitors: Sequence[Competitor]) -> Decision | None:
    """Who goes on, or None while there is nothing to decide.

    Of the configurations that were to reach the rung, failures included, one of `eta` goes on, at least `finalists`,
    and no arm whose value is not a finite number. An arm that a person has cancelled while it waited at the rung is a
    failure there, and none on the way to the next. A configuration's value is the mean over its seeds that have one;
    equal ones are ordered by their names. An arm that has no such rung, because it ends before it, takes no part; the
    others wait for its end.
    """
    paused = [each for each in competitors if each.standing is Standing.PAUSED]
    if not paused or any(each.standing is Standing.RUNNING for each in competitors):
        return None
    rung = min(each.rung for each in paused)
    here = [each for each in paused if each.rung == rung]
    lost = [each for each in competitors if each.standing is Standing.FAILED and each.rung in (rung - 1, rung)]
    present = len({each.configuration for each in here})
    # Whether an arm has failed behind the rung before or was cancelled at it, nothing tells: no more were promoted.
    entered = min(len({each.configuration for each in [*here, *lost]}), _promoted(stopping, competitors, rung))
    going = kept(stopping, max(present, entered))
    ranking = _ranked(here, greater=greater_is_better(stopping.metric))
    said = f"{PRUNED} {stopping.min_steps * stopping.eta**rung}: {stopping.metric}"
    better = f"is not among the best {len(ranking[:going])} of {present}"
    prune = {each.spec_hash: f"{said} is not a finite number" for each in here if not _has_value(each)}
    for arms in ranking[going:]:
        value = f"{_mean(arms):.4g}" if len(arms) == 1 else f"{_mean(arms):.4g}, the mean over {len(arms)} seeds,"
        prune |= {each.spec_hash: f"{said} {value} {better}" for each in arms}
    promote = tuple(each.spec_hash for arms in ranking[:going] for each in arms)
    return Decision(rung=rung, promote=promote, prune=prune)


def _promoted(stopping: EarlyStoppingSpec, competitors: Sequence[Competitor], rung: int) -> int:
    """How many configurations were to reach a rung, at most."""
    took_part = [each for each in competitors if each.standing is not Standing.FINISHED or each.rung >= 0]
    count = len({each.configuration for each in took_part})
    for _ in range(rung):
        count = kept(stopping, count)
    return count


def _ranked(here: Sequence[Competitor], *, greater: bool) -> list[list[Competitor]]:
    """Arms that have a value, by configuration, the best one first."""
    groups: dict[str, list[Competitor]] = {}
    for each in sorted(here, key=lambda each: each.spec_hash):
        if _has_value(each):
            groups.setdefault(each.configuration, []).append(each)
    sign = -1 if greater else 1
    return sorted(groups.values(), key=lambda arms: (sign * _mean(arms), arms[0].configuration))


def _has_value(arm: Competitor) -> bool:
    return arm.value is not None and math.isfinite(arm.value)


def _mean(arms: Sequence[Competitor]) -> float:
    return math.fsum(arm.value for arm in arms if arm.value is not None) / len(arms)


def budget(stopping: EarlyStoppingSpec, configurations: Sequence[Sequence[int]]) -> Budget:
    """The steps of a sweep with rungs.

    Where arms differ in length, each configuration is as likely as the others to be among those that go on.

    Args:
        stopping: The rungs.
        configurations: Of each configuration the steps of its arms: one for each seed.
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
