"""A sweep's points, as the file gives them: which fields each arm overrides, and with what."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from rankwise.experiment.document import KeyPath, Problem
from rankwise.experiment.expressions import Expression, ExpressionError
from rankwise.experiment.fields import did_you_mean, leaves, show, sweepable
from rankwise.experiment.hashing import plain
from rankwise.experiment.point import Point, bare
from rankwise.experiment.ranges import Axis, read_axis
from rankwise.experiment.resolve import find_field
from rankwise.experiment.space import SEARCHES, Space, read_space, sample_points

MAX_POINTS = 10_000
"""Points of a grid, before `where`."""
MAX_ARMS = 1_000


@dataclass(frozen=True, kw_only=True)
class Points:
    """What a sweep section says, with its problems.

    Attributes:
        points: The arms of a grid or list; of a search, points that have every choice and both ends of every range.
        where: The condition on arms.
        space: Of a search: what its points are drawn from.
        problems: Everything that is wrong.
    """

    points: tuple[Point, ...] = (Point(),)
    where: Expression | None = None
    space: Space | None = None
    problems: tuple[Problem, ...] = ()


def read_points(sweep: Any, seed: Any = 0) -> Points:
    """Read the raw `sweep` section. Wrong types of the section itself are the schema's to report.

    Args:
        sweep: The section.
        seed: The definition's own seed, for a search without one.
    """
    if not isinstance(sweep, dict):
        return Points()
    problems: list[Problem] = []
    where = _condition(sweep.get("where"), problems)
    parameters, arms = sweep.get("parameters", {}), sweep.get("arms", [])
    if parameters and arms:
        text = "stands beside parameters; give a grid (parameters) or a list (arms)"
        problems.append(Problem(path=("sweep", "arms"), text=text))
    searches = sweep.get("method", "grid") in SEARCHES
    axes = _axes(parameters, searches, problems) if isinstance(parameters, dict) else []
    space = read_space(sweep, axes, seed, problems)
    if searches:
        return Points(points=sample_points(axes), where=where, space=space, problems=tuple(problems))
    listed = _arms(arms, problems) if isinstance(arms, list) else []
    points = tuple(listed) or _grid({axis.path: list(axis.choices) for axis in axes}, problems)
    return Points(points=points, where=where, problems=tuple(problems))


def _condition(text: Any, problems: list[Problem]) -> Expression | None:
    if not isinstance(text, str) or not text:
        return None
    try:
        expression = Expression.parse(text, condition=True)
        for name in expression.names:
            find_field(name, "")
    except ExpressionError as error:
        problems.append(
            Problem(path=("sweep", "where"), text=f"must be a condition over fields, got {show(text)}: {error}")
        )
        return None
    return expression


def _axes(parameters: dict[str, Any], searches: bool, problems: list[Problem]) -> list[Axis]:
    axes = []
    for path, values in parameters.items():
        place: KeyPath = ("sweep", "parameters", path)
        if trouble := _not_swept(path):
            problems.append(Problem(path=place, text=trouble))
        elif isinstance(values, dict) and not searches:
            text = f"is a range, got {show(values)}; a grid needs a list of values, a range needs method: random or tpe"
            problems.append(Problem(path=place, text=text))
        elif not isinstance(values, list) and not searches:
            text = f"must be a list of values, got {show(values)}; did you mean [{bare(values)}]?"
            problems.append(Problem(path=place, text=text))
        elif (axis := read_axis(path, values, problems)) is not None and _check_choices(axis, problems):
            axes.append(axis)
    return axes


def _check_choices(axis: Axis, problems: list[Problem]) -> bool:
    """Whether a list has values; one that is there twice is reported."""
    if axis.kind != "choice":
        return True
    if not axis.choices:
        problems.append(Problem(path=axis.place, text="must have at least one value, got []"))
        return False
    seen: set[str] = set()
    for index, value in enumerate(axis.choices):
        if (spelling := _spelling(axis.path, value)) in seen:
            problems.append(Problem(path=(*axis.place, index), text=f"{show(value)} is listed twice; remove one"))
        seen.add(spelling)
    return True


def _grid(axes: dict[str, list[Any]], problems: list[Problem]) -> tuple[Point, ...]:
    size = 1
    for values in axes.values():
        size *= len(values)
    if size > MAX_POINTS:
        text = f"make a grid of {size:,} points; at most {MAX_POINTS:,} are allowed"
        problems.append(Problem(path=("sweep", "parameters"), text=text))
        return (Point(),)
    home: KeyPath = ("sweep", "parameters") if axes else ("sweep",)
    return tuple(
        Point(
            values={path: axes[path][index] for path, index in zip(axes, indices, strict=True)},
            places={path: ("sweep", "parameters", path, index) for path, index in zip(axes, indices, strict=True)},
            home=home,
            fixed=frozenset(path for path, values in axes.items() if len(values) == 1),
        )
        for indices in itertools.product(*(range(len(values)) for values in axes.values()))
    )


def _arms(arms: list[Any], problems: list[Problem]) -> list[Point]:
    points = []
    if len(arms) > MAX_ARMS:
        problems.append(
            Problem(path=("sweep", "arms"), text=f"has {len(arms):,} arms; at most {MAX_ARMS:,} are allowed")
        )
        return []
    for index, values in enumerate(arms):
        home: KeyPath = ("sweep", "arms", index)
        if not isinstance(values, dict):
            continue
        wrong = {path: trouble for path in values if (trouble := _not_swept(path))}
        problems.extend(Problem(path=(*home, path), text=trouble) for path, trouble in wrong.items())
        good = {path: value for path, value in values.items() if path not in wrong}
        points.append(Point(values=good, places={path: (*home, path) for path in good}, home=home))
    return points


def _not_swept(path: str) -> str | None:
    """Why a key is no axis, or None when it is one."""
    fields = sweepable()
    if path in fields:
        return None
    if path in leaves():
        return f"cannot differ between arms; allowed: {', '.join(_groups())}"
    hint = did_you_mean(path, fields, elsewhere=fields)
    return f"is not a field that can be swept{hint}; allowed: {', '.join(_groups())}"


def _groups() -> tuple[str, ...]:
    return ("lora.*", "training.*", "quantization.*", "dataset.limit.train", "seed")


def _spelling(path: str, value: Any) -> str:
    """One text for each setting: 16 and 16.0, and modules in any order, are the same."""
    if path == "lora.target_modules" and isinstance(value, list):
        value = sorted(map(str, value))
    return json.dumps(plain(value), sort_keys=True)
