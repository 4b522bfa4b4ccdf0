"""The space that a search draws its points from.

| form | values |
|---|---|
| `[2, 4, 8]`, `{choice: [2, 4, 8]}` | these |
| `{uniform: [0, 0.1]}` | numbers, every one as likely |
| `{log_uniform: [1e-4, 1e-2]}` | numbers, every order of magnitude as likely |
| `{int: [2, 64]}`, `{int: [2, 64], log: true}` | whole numbers, both ends included |

Nothing is kept between calls. A round is a pure function of the axes, the seed, the round's number and what the earlier
rounds gave, so that any process that knows these gets the same points. The numbers are rounded to few digits.

- One arm as a sweep gives it: the fields that it overrides, and where each value stands in the file.
- The axes of a search: what a sweep's parameter may range over, in place of a grid's list of values.
- Points of a search, drawn at random or proposed from results: optuna's samplers, asked and told.
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
from rankwise.experiment.fields import did_you_mean, numbers, show
from rankwise.experiment.paths import KeyPath
from rankwise.experiment.schema import digest, plain

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True, kw_only=True)
class Point:
    """The overrides of one arm, by dotted field path, and the key path where each value stands in the file."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, KeyPath] = field(default_factory=dict)
    home: KeyPath = ("sweep",)
    fixed: frozenset[str] = frozenset()
    """Axes with one value, which tell nothing apart."""

    @property
    def label(self) -> str:
        """`lora.r=8, seed=0`."""
        told = {path: value for path, value in self.values.items() if path not in self.fixed}
        return ", ".join(f"{path}={bare(value)}" for path, value in told.items())


def bare(value: Any) -> str:
    """A value as a label shows it: `8`, `all-linear`, `q_proj,v_proj`."""
    if isinstance(value, list):
        return ",".join(map(bare, value))
    return value if isinstance(value, str) else show(value)


Kind = Literal["choice", "uniform", "log_uniform", "int"]
KINDS: tuple[Kind, ...] = ("uniform", "log_uniform", "int", "choice")
FORMS = "{uniform: [low, high]}, {log_uniform: [low, high]}, {int: [low, high], log: true} or {choice: [...]}"
# Enough to tell learning rates apart, few enough to be read, compared and repeated by hand.
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One parameter of a search.

    Attributes:
        path: The field, dotted.
        place: Where it stands in the file: `sweep.parameters.PATH`, and `choice` where that is written out.
        kind: How values are drawn.
        low: Smallest value of a range.
        high: Largest value of a range.
        log: Whether a range of whole numbers is drawn by order of magnitude.
        choices: The values of a choice.
    """

    path: str
    place: KeyPath
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def size(self) -> float:
        """How many different values there are; infinity for a range of numbers."""
        if self.kind == "choice":
            return len(self.choices)
        return self.high - self.low + 1 if self.kind == "int" else math.inf

    @property
    def samples(self) -> tuple[tuple[Any, KeyPath], ...]:
        """Values that must be good for all to be, with their places: every choice, both ends of a range."""
        values = self.choices if self.kind == "choice" else (self.low, self.high)
        return tuple((value, (*self.place, index)) for index, value in enumerate(values))

    def rounded(self, value: float) -> float:
        """A drawn number with few digits, still in the range."""
        if self.kind == "int":
            return int(value)
        return min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))


def read_axis(path: str, value: Any, problems: list[Problem]) -> Axis | None:
    """An axis of a search from what stands in the file, or None with what is wrong added to `problems`.

    The values of a choice are checked elsewhere, as those of a grid are.
    """
    place: KeyPath = ("sweep", "parameters", path)
    if isinstance(value, list):
        return Axis(path=path, place=place, kind="choice", choices=tuple(value))
    if not isinstance(value, dict):
        text = f"must be a list of values, or {FORMS}, got {show(value)}"
        problems.append(Problem(path=place, text=text))
        return None
    unknown = [key for key in value if key not in {*KINDS, "log"}]
    for key in unknown:
        text = f"is no kind of range{did_you_mean(key, KINDS)}; allowed: {', '.join(KINDS)}"
        problems.append(Problem(path=(*place, key), text=text))
    kinds: list[Kind] = [kind for kind in KINDS if kind in value]
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
    return Axis(path=path, place=(*place, kind), kind=kind, low=low, high=high, log=bool(value.get("log")))


def _choice(path: str, place: KeyPath, values: Any, problems: list[Problem]) -> Axis | None:
    if isinstance(values, list):
        return Axis(path=path, place=place, kind="choice", choices=tuple(values))
    problems.append(Problem(path=place, text=f"must be a list of values, got {show(values)}"))
    return None


def _check_log(place: KeyPath, kind: Kind, value: Mapping[str, Any], problems: list[Problem]) -> None:
    if "log" not in value:
        return
    if kind != "int":
        text = f"belongs to int, not to {kind}" + ("; take log_uniform" if kind == "uniform" else "; remove it")
        problems.append(Problem(path=(*place, "log"), text=text))
    elif not isinstance(value["log"], bool):
        problems.append(Problem(path=(*place, "log"), text=f"must be true or false, got {show(value['log'])}"))


def _check_kind(path: str, place: KeyPath, kind: Kind, problems: list[Problem]) -> None:
    holds = numbers().get(path)
    if holds is None:
        text = f"holds no number, so it has no range from low to high; give a list of values, not {kind}"
        problems.append(Problem(path=(*place, kind), text=text))
    elif holds == "integer" and kind != "int":
        logarithmic = ", log: true" if kind == "log_uniform" else ""
        text = f"draws fractions, but {path} is a whole number; did you mean {{int: [low, high]{logarithmic}}}?"
        problems.append(Problem(path=(*place, kind), text=text))


def _check_ends(place: KeyPath, kind: Kind, ends: Any, log: bool, problems: list[Problem]) -> None:
    what = "whole numbers" if kind == "int" else "numbers"
    allowed = int if kind == "int" else (int, float)

    def good(end: Any) -> bool:
        return isinstance(end, allowed) and not isinstance(end, bool) and math.isfinite(end)

    if not isinstance(ends, list) or len(ends) != 2 or not all(map(good, ends)):
        text = f"must be [low, high], two {what}, got {show(ends)}"
    elif ends[0] >= ends[1]:
        text = f"must be [low, high] with low less than high, got {show(ends)}"
    elif (log or kind == "log_uniform") and ends[0] <= 0:
        text = f"must have a low end greater than 0 to be drawn by order of magnitude, got {show(ends)}"
    else:
        return
    problems.append(Problem(path=place, text=text))


Search = Literal["random", "tpe"]
SEARCHES: tuple[Search, ...] = get_args(Search)
ROUND_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Space:
    """The axes of a search, and how its points are chosen.

    Attributes:
        axes: At least one.
        method: `random` or `tpe`.
        trials: Arms in all.
        round_size: Arms that tpe proposes together.
        seed: Of the search.
    """

    axes: tuple[Axis, ...]
    method: Search
    trials: int
    round_size: int
    seed: int

    @property
    def size(self) -> float:
        """How many different points there are; infinity with a range of numbers."""
        size = 1.0
        for axis in self.axes:
            size *= axis.size
        return size

    @property
    def rounds(self) -> tuple[int, ...]:
        """Arms of each round."""
        if self.method == "random":
            return (self.trials,)
        whole, rest = divmod(self.trials, self.round_size)
        return (self.round_size,) * whole + ((rest,) if rest else ())


def sample_points(axes: Sequence[Axis]) -> tuple[Point, ...]:
    """Points that together have every choice and both ends of every range."""
    columns = {axis.path: axis.samples for axis in axes}
    count = max((len(column) for column in columns.values()), default=1)
    return tuple(
        Point(
            values={path: column[index % len(column)][0] for path, column in columns.items()},
            places={path: column[index % len(column)][1] for path, column in columns.items()},
            home=("sweep", "parameters"),
        )
        for index in range(count)
    )


def read_space(sweep: Mapping[str, Any], axes: Sequence[Axis], seed: Any, problems: list[Problem]) -> Space | None:
    """The space of a raw `sweep` section whose axes were read; None for a grid and for what is wrong.

    Keys of the wrong type are the schema's to report.
    """
    method = sweep.get("method", "grid")
    before = len(problems)
    for key, methods in (("trials", SEARCHES), ("round_size", ("tpe",)), ("seed", SEARCHES)):
        if sweep.get(key) is not None and method in {"grid", *SEARCHES} and method not in methods:
            text = f"belongs to method {' or '.join(methods)}, got {show(sweep[key])} with method {method}; remove it"
            problems.append(Problem(path=("sweep", key), text=text))
    if method not in SEARCHES:
        return None
    if sweep.get("arms"):
        text = f"is a list, which method {method} does not draw from; give parameters, or method: grid"
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
    space = Space(axes=tuple(axes), method=method, trials=numbers[0], round_size=numbers[1], seed=numbers[2])
    if space.trials > space.size:
        text = f"must be at most the {space.size:,.0f} points that the parameters make, got {trials}"
        problems.append(Problem(path=("sweep", "trials"), text=text))
        return None
    return space


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


def _spelling(point: Point) -> bytes:
    return canonical_json(plain(point.values))
