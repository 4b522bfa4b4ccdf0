"""A search: its space, and rounds of points, drawn at random or proposed from results by optuna's samplers.

| axis | values |
|---|---|
| `[2, 4, 8]`, `{choice: [2, 4, 8]}` | these |
| `{uniform: [0, 0.1]}` | numbers, all equally likely |
| `{log_uniform: [1e-4, 1e-2]}` | numbers, all orders of magnitude equally likely |
| `{int: [2, 64]}`, `{int: [2, 64], log: true}` | whole numbers, both ends included |

No state is kept between calls. A round is a pure function of the axes, the seed, the round's number and earlier
results, so any process gets the same points. Numbers are rounded to 4 digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, get_args

from rankwise.digests import canonical_json
from rankwise.experiment.document import Problem
from rankwise.experiment.fields import did_you_mean, number_kind, show
from rankwise.experiment.hashing import digest, plain
from rankwise.experiment.paths import KeyPath

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """The overrides of one arm by dotted field path, and the key path of each value in the file."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, KeyPath] = field(default_factory=dict)
    home: KeyPath = ("sweep",)
    fixed: frozenset[str] = frozenset()
    """Axes with a single value, which labels leave out."""

    @property
    def label(self) -> str:
        """`lora.r=8, seed=0`."""
        varied = {path: value for path, value in self.values.items() if path not in self.fixed}
        return ", ".join(f"{path}={bare(value)}" for path, value in varied.items())


def bare(value: Any) -> str:
    """A value in a label: `8`, `all-linear`, `q_proj,v_proj`."""
    if isinstance(value, list):
        return ",".join(map(bare, value))
    return value if isinstance(value, str) else show(value)


RangeKind = Literal["choice", "uniform", "log_uniform", "int"]
KINDS: tuple[RangeKind, ...] = ("uniform", "log_uniform", "int", "choice")
FORMS = "{uniform: [low, high]}, {log_uniform: [low, high]}, {int: [low, high], log: true} or {choice: [...]}"
# Enough to distinguish learning rates, few enough to read and type.
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class SweepAxis:
    """One parameter of a search: a choice of values, or a range from `low` to `high`, both included.

    `place` is its key path in the file; `log` draws whole numbers by order of magnitude.
    """

    path: str
    place: KeyPath
    kind: RangeKind
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def size(self) -> float:
        """The number of different values; infinity for a range of numbers."""
        if self.kind == "choice":
            return len(self.choices)
        return self.high - self.low + 1 if self.kind == "int" else math.inf

    @property
    def samples(self) -> tuple[tuple[Any, KeyPath], ...]:
        """Values to check, with their places: all choices, or both ends of a range."""
        values = self.choices if self.kind == "choice" else (self.low, self.high)
        return tuple((value, (*self.place, index)) for index, value in enumerate(values))

    def rounded(self, value: float) -> float:
        """A drawn number rounded to `DIGITS` digits, within the range."""
        if self.kind == "int":
            return int(value)
        return min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))


def read_axis(path: str, value: Any, problems: list[Problem]) -> SweepAxis | None:
    """Read an axis of a search, or return None and add to `problems`. The caller checks the values of a choice."""
    place: KeyPath = ("sweep", "parameters", path)
    if isinstance(value, list):
        return SweepAxis(path=path, place=place, kind="choice", choices=tuple(value))
    if not isinstance(value, dict):
        text = f"must be a list of values, or {FORMS}, got {show(value)}"
        problems.append(Problem(path=place, text=text))
        return None
    unknown = [key for key in value if key not in {*KINDS, "log"}]
    for key in unknown:
        text = f"is not a kind of range{did_you_mean(key, KINDS)}; allowed: {', '.join(KINDS)}"
        problems.append(Problem(path=(*place, key), text=text))
    kinds: list[RangeKind] = [kind for kind in KINDS if kind in value]
    if unknown:
        return None
    if len(kinds) != 1:
        text = f"must have one of {', '.join(KINDS)}, has {' and '.join(kinds) or 'none'}"
        problems.append(Problem(path=place, text=text))
        return None
    (kind,) = kinds
    before = len(problems)
    _check_log(place, kind, value, problems)
    ends = value[kind]
    if kind == "choice":
        return _choice(path, (*place, kind), ends, problems)
    _check_kind(path, place, kind, problems)
    _check_ends((*place, kind), kind, ends, bool(value.get("log")), problems)
    if len(problems) > before:
        return None
    low, high = ends
    return SweepAxis(path=path, place=(*place, kind), kind=kind, low=low, high=high, log=bool(value.get("log")))


def _choice(path: str, place: KeyPath, values: Any, problems: list[Problem]) -> SweepAxis | None:
    if isinstance(values, list):
        return SweepAxis(path=path, place=place, kind="choice", choices=tuple(values))
    problems.append(Problem(path=place, text=f"must be a list of values, got {show(values)}"))
    return None


def _check_log(place: KeyPath, kind: RangeKind, value: Mapping[str, Any], problems: list[Problem]) -> None:
    if "log" not in value:
        return
    if kind != "int":
        text = f"is allowed with int only, not with {kind}" + (
            "; use log_uniform" if kind == "uniform" else "; remove it"
        )
        problems.append(Problem(path=(*place, "log"), text=text))
    elif not isinstance(value["log"], bool):
        problems.append(Problem(path=(*place, "log"), text=f"must be true or false, got {show(value['log'])}"))


def _check_kind(path: str, place: KeyPath, kind: RangeKind, problems: list[Problem]) -> None:
    holds = number_kind(path)
    if holds is None:
        text = f"is not a number, so it cannot have a range; give a list of values, not {kind}"
        problems.append(Problem(path=(*place, kind), text=text))
    elif holds == "integer" and kind != "int":
        logarithmic = ", log: true" if kind == "log_uniform" else ""
        text = f"draws fractions, but {path} must be a whole number; did you mean {{int: [low, high]{logarithmic}}}?"
        problems.append(Problem(path=(*place, kind), text=text))


def _check_ends(place: KeyPath, kind: RangeKind, ends: Any, log: bool, problems: list[Problem]) -> None:
    numbers = "whole numbers" if kind == "int" else "numbers"
    allowed = int if kind == "int" else (int, float)

    def is_valid(end: Any) -> bool:
        return isinstance(end, allowed) and not isinstance(end, bool) and math.isfinite(end)

    if not isinstance(ends, list) or len(ends) != 2 or not all(map(is_valid, ends)):
        text = f"must be [low, high], two {numbers}, got {show(ends)}"
    elif ends[0] >= ends[1]:
        text = f"must be [low, high] with low less than high, got {show(ends)}"
    elif (log or kind == "log_uniform") and ends[0] <= 0:
        text = f"must have low greater than 0, since values are drawn by order of magnitude, got {show(ends)}"
    else:
        return
    problems.append(Problem(path=place, text=text))


Search = Literal["random", "tpe"]
SEARCHES: tuple[Search, ...] = get_args(Search)
ROUND_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The axes of a search (at least one), and how its points are chosen.

    `trials` is the total number of arms, `round_size` the number that tpe proposes together.
    """

    axes: tuple[SweepAxis, ...]
    method: Search
    trials: int
    round_size: int
    seed: int

    @property
    def size(self) -> float:
        """The number of different points; infinity with a range of numbers."""
        size = 1.0
        for axis in self.axes:
            size *= axis.size
        return size

    @property
    def rounds(self) -> tuple[int, ...]:
        """The number of arms of each round."""
        if self.method == "random":
            return (self.trials,)
        whole, rest = divmod(self.trials, self.round_size)
        return (self.round_size,) * whole + ((rest,) if rest else ())


def sample_points(axes: Sequence[SweepAxis]) -> tuple[SweepPoint, ...]:
    """Points that together cover every choice and both ends of every range."""
    columns = {axis.path: axis.samples for axis in axes}
    count = max((len(column) for column in columns.values()), default=1)
    return tuple(
        SweepPoint(
            values={path: column[index % len(column)][0] for path, column in columns.items()},
            places={path: column[index % len(column)][1] for path, column in columns.items()},
            home=("sweep", "parameters"),
        )
        for index in range(count)
    )


def method_of(sweep: Mapping[str, Any]) -> str | None:
    """The method of a raw `sweep` section, or None if it is not text, which the schema reports."""
    method = sweep.get("method", "grid")
    return method if isinstance(method, str) else None


def read_space(
    sweep: Mapping[str, Any], axes: Sequence[SweepAxis], seed: Any, problems: list[Problem]
) -> SearchSpace | None:
    """Read the search space of a raw `sweep` section; None for a grid, or if there are problems.

    The schema reports keys of the wrong type.
    """
    method = method_of(sweep)
    if method is None:
        return None
    before = len(problems)
    for key, methods in (("trials", SEARCHES), ("round_size", ("tpe",)), ("seed", SEARCHES)):
        if sweep.get(key) is not None and method in {"grid", *SEARCHES} and method not in methods:
            only = f"is allowed only with method {' or '.join(methods)}"
            text = f"{only}, got {show(sweep[key])} with method {method}; remove it"
            problems.append(Problem(path=("sweep", key), text=text))
    if method not in SEARCHES:
        return None
    if sweep.get("arms"):
        text = f"is a list, which method {method} cannot draw from; give parameters, or method: grid"
        problems.append(Problem(path=("sweep", "arms"), text=text))
    elif not sweep.get("parameters"):
        problems.append(Problem(path=("sweep", "method"), text=f"is {method}, which needs parameters to draw from"))
    trials = sweep.get("trials")
    if trials is None:
        problems.append(Problem(path=("sweep", "trials"), text=f"is missing; method {method} needs the number of arms"))
    if sweep.get("seed") is None and isinstance(seed, str):
        text = f"is missing; the definition's seed is an expression ({show(seed)}), and a search needs a number"
        problems.append(Problem(path=("sweep", "seed"), text=text))
    numbers = [trials, sweep.get("round_size") or ROUND_SIZE, seed if sweep.get("seed") is None else sweep["seed"]]
    if len(problems) > before or not axes or not all(type(number) is int for number in numbers):
        return None
    space = SearchSpace(axes=tuple(axes), method=method, trials=numbers[0], round_size=numbers[1], seed=numbers[2])
    if space.trials > space.size:
        text = f"must be at most {space.size:,.0f}, the number of points of the parameters, got {trials}"
        problems.append(Problem(path=("sweep", "trials"), text=text))
        return None
    return space


# Consecutive discarded points before the search gives up.
MAX_REJECTED = 1000
# After so many, points are drawn at random: the estimator may keep proposing a known point.
MAX_REFINED = 50

Acceptance = Literal["good", "duplicate", "rejected"]


class TrialState(StrEnum):
    """How a trial of an earlier round ended."""

    COMPLETE = "complete"
    """Has a value."""
    PRUNED = "pruned"
    """Stopped early, or its training failed: worse than any complete trial."""
    UNKNOWN = "unknown"
    """Cancelled or without a value: says nothing about its point."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A point that was tried, and its result.

    A complete trial has a `value` of the primary metric; a pruned one has its last evaluated rung as `step`, and its
    value `at_step`.
    """

    point: SweepPoint
    state: TrialState
    value: float | None = None
    step: int | None = None
    at_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The points of one round, possibly fewer than requested.

    `rejected` counts discarded points: equal to another, or excluded by `where`.
    """

    points: tuple[SweepPoint, ...]
    rejected: int


def propose(
    space: SearchSpace,
    number: int,
    history: Sequence[Trial] = (),
    *,
    greater_is_better: bool = False,
    accept: Callable[[SweepPoint], Acceptance] = lambda point: "good",
) -> Proposal:
    """The points of round `number`, counted from 0.

    The first round, and all of `random`, are independent draws. Later rounds use the tree-structured Parzen estimator
    (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", 2011). It models good and bad points; points of the
    running round count as bad, which keeps them apart. `history` holds all trials of earlier rounds, in order. `accept`
    decides on each new point; `rejected` ones count as bad.
    """
    import optuna

    # By default, optuna writes a line to stderr per study.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = int(digest({"seed": space.seed, "round": number})[:8], 16)
    guided = number > 0
    study = _study(space, history, greater_is_better, seed if guided else None)
    at_random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    distributions = {axis.path: _distribution(axis) for axis in space.axes}
    drawn = {_canonical(trial.point) for trial in history}
    points: list[SweepPoint] = []
    rejected = discarded = 0
    while len(points) < space.rounds[number] and discarded < MAX_REJECTED:
        source = study if guided and discarded < MAX_REFINED else at_random
        trial = source.ask(distributions)
        point = _point(space, trial.params)
        canonical = _canonical(point)
        acceptance = "duplicate" if canonical in drawn else accept(point)
        drawn.add(canonical)
        if acceptance == "good":
            points.append(point)
            discarded = 0
            continue
        # A rejected point counts as bad; a known point tells the estimator nothing new.
        state = optuna.trial.TrialState.PRUNED if acceptance == "rejected" else optuna.trial.TrialState.FAIL
        source.tell(trial, state=state)
        rejected += 1
        discarded += 1
    return Proposal(points=tuple(points), rejected=rejected)


def _study(
    space: SearchSpace, history: Sequence[Trial], greater_is_better: bool, seed: int | None
) -> optuna.study.Study:
    import optuna

    sampler = optuna.samplers.TPESampler(n_startup_trials=1, seed=seed)
    study = optuna.create_study(sampler=sampler, direction="maximize" if greater_is_better else "minimize")
    states = {
        TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
        TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
        TrialState.UNKNOWN: optuna.trial.TrialState.FAIL,
    }
    distributions = {axis.path: _distribution(axis) for axis in space.axes}
    for trial in history:
        at_step = {} if trial.step is None or trial.at_step is None else {trial.step: trial.at_step}
        study.add_trial(
            optuna.trial.create_trial(
                state=states[trial.state],
                params={axis.path: _encoded(axis, trial.point.values[axis.path]) for axis in space.axes},
                distributions=distributions,
                value=trial.value if trial.state is TrialState.COMPLETE else None,
                intermediate_values=at_step,
            )
        )
    return study


def _distribution(axis: SweepAxis) -> optuna.distributions.BaseDistribution:
    from optuna import distributions as kinds

    if axis.kind == "choice":
        return kinds.CategoricalDistribution([_encoded(axis, value) for value in axis.choices])
    if axis.kind == "int":
        return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.kind == "log_uniform")


def _encoded(axis: SweepAxis, value: Any) -> Any:
    """A value for optuna, where a choice that is a list must be text."""
    return json.dumps(value, sort_keys=True) if axis.kind == "choice" else value


def _point(space: SearchSpace, params: Mapping[str, Any]) -> SweepPoint:
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
    return SweepPoint(values=values, places=places, home=("sweep", "parameters"), fixed=fixed)


def _canonical(point: SweepPoint) -> bytes:
    return canonical_json(plain(point.values))
