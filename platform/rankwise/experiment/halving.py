"""Successive halving: who goes on at a rung, and what a sweep with rungs costs.

Arms are trained to the first rung (`min_steps`), compared there, and of `eta` arms one goes on to the next rung, which
is `eta` times as far (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", 2016). It is synchronous: nothing is decided before every living arm has reached the rung or its end, so
that the decision depends on results alone, and not on which worker was the faster one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rankwise.experiment.metric_names import greater_is_better
from rankwise.experiment.schema import EarlyStoppingSpec

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
        standing: Where it stands.
        rung: The last rung that it has reached, counted from 0; -1 before the first.
        value: The metric there; None before the first.
    """

    spec_hash: str
    standing: Standing
    rung: int = -1
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What follows at a rung.

    Attributes:
        rung: Which, counted from 0.
        promote: Spec hashes of the arms that go on, the best first.
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


def rungs(stopping: EarlyStoppingSpec, total_steps: int) -> tuple[int, ...]:
    """The steps after which an arm of `total_steps` steps is compared; its end is none."""
    steps = []
    step = stopping.min_steps
    while step < total_steps:
        steps.append(step)
        step *= stopping.eta
    return tuple(steps)


def decide(stopping: EarlyStoppingSpec, competitors: Sequence[Competitor]) -> Decision | None:
    """Who goes on, or None while there is nothing to decide.

    Of those that were to reach the rung, failures included, one of `eta` goes on, at least one, and none whose value is
    not a finite number. Equal values are ordered by spec hash. An arm that has no such rung, because it ends before it,
    takes no part; the others wait for its end.
    """
    paused = [each for each in competitors if each.standing is Standing.PAUSED]
    if not paused or any(each.standing is Standing.RUNNING for each in competitors):
        return None
    rung = min(each.rung for each in paused)
    here = [each for each in paused if each.rung == rung]
    lost = [each for each in competitors if each.standing is Standing.FAILED and each.rung == rung - 1]
    keep = max(1, (len(here) + len(lost)) // stopping.eta)
    sign = -1 if greater_is_better(stopping.metric) else 1
    ranked = sorted(
        (sign * each.value, each.spec_hash) for each in here if each.value is not None and math.isfinite(each.value)
    )
    promote = tuple(spec_hash for _, spec_hash in ranked[:keep])
    step = stopping.min_steps * stopping.eta**rung
    prune = {
        each.spec_hash: _reason(stopping.metric, step, each.value, len(promote), len(here))
        for each in here
        if each.spec_hash not in promote
    }
    return Decision(rung=rung, promote=promote, prune=prune)


def _reason(metric: str, step: int, value: float | None, kept: int, of: int) -> str:
    if value is None or not math.isfinite(value):
        return f"{PRUNED} {step}: {metric} is not a finite number"
    return f"{PRUNED} {step}: {metric} {value:.4g} is not among the best {kept} of {of}"


def budget(stopping: EarlyStoppingSpec, totals: Sequence[int]) -> Budget:
    """The steps of a sweep whose arms have these totals.

    Where arms differ in length, each is as likely as the others to be among those that go on.
    """
    share = 1.0
    planned: list[PlannedRung] = []
    expected = 0.0
    before = 0
    for step in rungs(stopping, max(totals, default=0)):
        expected += share * sum(min(total, step) - before for total in totals if total > before)
        arms = max(1, round(share * sum(total > step for total in totals)))
        kept = max(1, arms // stopping.eta)
        planned.append(PlannedRung(step=step, arms=arms, kept=kept))
        share *= kept / arms
        before = step
    expected += share * sum(total - before for total in totals if total > before)
    return Budget(rungs=tuple(planned), expected=round(expected), upper=sum(totals))
