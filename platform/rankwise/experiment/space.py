"""The space that a search draws its points from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rankwise.experiment.document import Problem
from rankwise.experiment.fields import show
from rankwise.experiment.point import Point
from rankwise.experiment.ranges import Axis

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
