"""Points of a search, drawn at random or proposed from results: optuna's samplers, asked and told.

Nothing is kept between calls. A round is a pure function of the axes, the seed, the round's number and what the earlier
rounds gave, so that any process that knows these gets the same points. The numbers are rounded to few digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from rankwise.experiment.document import KeyPath
from rankwise.experiment.hashing import digest, plain
from rankwise.experiment.point import Point
from rankwise.experiment.ranges import Axis
from rankwise.experiment.space import Space

if TYPE_CHECKING:
    import optuna

# A point that is not wanted is drawn again so often before the search gives up.
MAX_REJECTED = 1000
# Of these, so many by the estimator, which may insist on a point that was tried already; then at random.
MAX_REFINED = 50

Verdict = Literal["good", "duplicate", "rejected"]


class TrialState(StrEnum):
    """How a trial of an earlier round ended."""

    COMPLETE = "complete"
    """It has a value."""
    PRUNED = "pruned"
    """It was stopped early, or its training failed: worse than any complete one."""
    UNKNOWN = "unknown"
    """Nothing was learnt about its point: it was cancelled, or has no value."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is known about a point that was tried.

    Attributes:
        point: The point.
        state: How its trial ended.
        value: The primary metric of a complete one.
        step: The last rung of a pruned one that was evaluated.
        at_step: The value there.
    """

    point: Point
    state: TrialState
    value: float | None = None
    step: int | None = None
    at_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One round.

    Attributes:
        points: Those that were taken; fewer than wanted when no more were found.
        rejected: Points drawn in vain: equal to another, or refused by `where`.
    """

    points: tuple[Point, ...]
    rejected: int


def ask(
    space: Space,
    number: int,
    told: Sequence[Told] = (),
    *,
    greater_is_better: bool = False,
    accept: Callable[[Point], Verdict] = lambda point: "good",
) -> Asked:
    """The points of round `number`, counted from 0.

    The first round, and all of `random`, are independent draws. Later ones are tpe's (Bergstra et al., "Algorithms for
    Hyper-Parameter Optimization", 2011): it models where good and bad points lie, and treats those of the running round
    as bad, so that they lie apart.

    Args:
        space: The axes.
        number: The round.
        told: Everything that the earlier rounds gave, in the order in which it was asked.
        greater_is_better: Of the primary metric.
        accept: Asked of every point that differs from all others; `rejected` ones are told to the estimator as bad.
    """
    import optuna

    # Otherwise it writes a line to stderr for every study.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = int(digest({"seed": space.seed, "round": number})[:8], 16)
    guided = number > 0
    study = _study(space, told, greater_is_better, seed if guided else None)
    at_random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    distributions = {axis.path: _distribution(axis) for axis in space.axes}
    seen = {_spelling(each.point) for each in told}
    points: list[Point] = []
    rejected = in_vain = 0
    while len(points) < space.rounds[number] and in_vain < MAX_REJECTED:
        asked = study if guided and in_vain < MAX_REFINED else at_random
        trial = asked.ask(distributions)
        point = _point(space, trial.params)
        spelling = _spelling(point)
        verdict = "duplicate" if spelling in seen else accept(point)
        seen.add(spelling)
        if verdict == "good":
            points.append(point)
            in_vain = 0
            continue
        # A refused place is a bad one; about a point that was tried already there is nothing to learn.
        state = optuna.trial.TrialState.PRUNED if verdict == "rejected" else optuna.trial.TrialState.FAIL
        asked.tell(trial, state=state)
        rejected += 1
        in_vain += 1
    return Asked(points=tuple(points), rejected=rejected)


def _study(space: Space, told: Sequence[Told], greater_is_better: bool, seed: int | None) -> optuna.study.Study:
    """A study in memory that knows what was told."""
    import optuna

    sampler = optuna.samplers.TPESampler(n_startup_trials=1, seed=seed)
    study = optuna.create_study(sampler=sampler, direction="maximize" if greater_is_better else "minimize")
    states = {
        TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
        TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
        TrialState.UNKNOWN: optuna.trial.TrialState.FAIL,
    }
    distributions = {axis.path: _distribution(axis) for axis in space.axes}
    for each in told:
        at_step = {} if each.step is None or each.at_step is None else {each.step: each.at_step}
        study.add_trial(
            optuna.trial.create_trial(
                state=states[each.state],
                params={axis.path: _encoded(axis, each.point.values[axis.path]) for axis in space.axes},
                distributions=distributions,
                value=each.value if each.state is TrialState.COMPLETE else None,
                intermediate_values=at_step,
            )
        )
    return study


def _distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    from optuna import distributions as kinds

    if axis.kind == "choice":
        return kinds.CategoricalDistribution([_encoded(axis, value) for value in axis.choices])
    if axis.kind == "int":
        return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.kind == "log_uniform")


def _encoded(axis: Axis, value: Any) -> Any:
    """A value as optuna takes it: a choice may be a list, which has to be text there."""
    return json.dumps(value, sort_keys=True) if axis.kind == "choice" else value


def _point(space: Space, params: Mapping[str, Any]) -> Point:
    values: dict[str, Any] = {}
    places: dict[str, KeyPath] = {}
    for axis in space.axes:
        drawn = params[axis.path]
        if axis.kind == "choice":
            index = [_encoded(axis, value) for value in axis.choices].index(drawn)
            values[axis.path], places[axis.path] = axis.choices[index], (*axis.place, index)
        else:
            values[axis.path], places[axis.path] = axis.rounded(drawn), axis.place
    fixed = frozenset(axis.path for axis in space.axes if axis.size == 1)
    return Point(values=values, places=places, home=("sweep", "parameters"), fixed=fixed)


def _spelling(point: Point) -> str:
    return json.dumps(plain(point.values), sort_keys=True)
