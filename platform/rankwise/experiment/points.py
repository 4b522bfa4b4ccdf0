"""A sweep's points, as the file gives them: which fields each arm overrides, and with what.

- Every field of resolved data by itself, and what is wrong with it in words.
- Points become arms: overlaid, their expressions evaluated, the condition asked, fields and rules checked.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rankwise.digests import canonical_json
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.document import Problem
from rankwise.experiment.expressions import (
    Expression,
    ExpressionError,
    Resolution,
    Unresolved,
    evaluate_condition,
    find_field,
    resolve,
)
from rankwise.experiment.fields import (
    allowed,
    did_you_mean,
    keys,
    leaves,
    node_at,
    options,
    show,
    sweepable,
    unknown_key,
)
from rankwise.experiment.paths import KeyPath, as_path, dotted, put
from rankwise.experiment.rules import View, find_problems
from rankwise.experiment.schema import ExperimentSpec, plain
from rankwise.experiment.search import (
    SEARCHES,
    Axis,
    Point,
    Space,
    Told,
    Verdict,
    ask,
    bare,
    read_axis,
    read_space,
    sample_points,
)

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
    seen: set[bytes] = set()
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


def _spelling(path: str, value: Any) -> bytes:
    """One text for each setting: 16 and 16.0, and modules in any order, are the same."""
    if path == "lora.target_modules" and isinstance(value, list):
        value = sorted(map(str, value))
    return canonical_json(plain(value))


# Branches of the union dataset.eval, which pydantic puts into an error's place.
_TAGS = {"source", "split"}


def overlay(data: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of plain data with the values of some fields, by dotted path."""
    result = copy.deepcopy(data)
    for path, value in values.items():
        put(result, as_path(path), copy.deepcopy(value))
    return result


def validate(resolution: Resolution) -> tuple[ExperimentSpec | None, list[Problem]]:
    """The definition, or None with what is wrong."""
    try:
        spec = ExperimentSpec.model_validate(resolution.data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        problems = [_translate(detail, resolution) for detail in details]
        reported = {problem.path for problem in resolution.problems} | {as_path(path) for path in resolution.skipped}
        wrong = {dotted(problem.path) for problem in problems}
        # With r = 0, an alpha of 2*r is wrong too, but not by itself.
        reported |= {as_path(path) for path, needs in resolution.needs.items() if needs & wrong}
        return None, [*resolution.problems, *(problem for problem in problems if problem.path not in reported)]
    return spec, list(resolution.problems)


def _translate(error: ErrorDetails, resolution: Resolution) -> Problem:
    path = tuple(part for part in error["loc"])
    if path[:2] == ("dataset", "eval") and path[2:3] and path[2] in _TAGS:
        path = (*path[:2], *path[3:])
    if path and path[-1] == "[key]":
        return Problem(path=path[:-1], text="has a key that is not text")
    if error["type"] == "extra_forbidden":
        return Problem(path=path, text=unknown_key(path))
    if error["type"] == "missing":
        return Problem(path=path, text=f"is missing; must be {allowed(path)}")
    value = error["input"]
    text = f"must be {allowed(path)}, got {show(value)}"
    if source := resolution.expressions.get(dotted(path)):
        text += f" from {source!r}"
    return Problem(path=path, text=text + _hint(path, value))


def _hint(path: KeyPath, value: Any) -> str:
    node = node_at(path)
    if node is None or not isinstance(value, str):
        return ""
    choices = [str(choice) for option in options(node) for choice in option.get("enum", [])]
    if choices:
        return did_you_mean(value, choices)
    if any(option.get("type") == "boolean" for option in options(node)):
        truth = {"yes": "true", "on": "true", "no": "false", "off": "false", "true": "true", "false": "false"}
        meant = truth.get(value.lower())
        return f"; did you mean {meant}? (in YAML 1.2 {value} is text)" if meant else ""
    if any(option.get("type") == "array" for option in options(node)) and not keys(node):
        return f"; did you mean [{value}]?" if "," not in value else ""
    return ""


class ConditionError(Exception):
    """Raised when `where` cannot be evaluated for some point. Its problem says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point that meets the condition.

    Attributes:
        point: Where it comes from.
        arm: The arm; None when a field of it is wrong.
        problems: What is wrong, at the paths of an arm's fields.
    """

    point: Point
    arm: ArmSpec | None
    problems: tuple[Problem, ...]


class Candidates:
    """Makes candidates out of a definition and the points of its sweep."""

    def __init__(self, data: dict[str, Any], where: Expression | None, *, elsewhere: bool = False) -> None:
        """Take the definition's data without its sweep, and the sweep's condition; `elsewhere` as in `rules.View`."""
        self._elsewhere = elsewhere
        self._base = {key: value for key, value in data.items() if key != "sweep"}
        self._where = where

    def of(self, point: Point) -> Candidate | None:
        """The candidate of a point, or None when `where` refuses it.

        Raises:
            ConditionError: `where` cannot be evaluated.
        """
        resolution = resolve(overlay(self._base, point.values))
        try:
            if self._where is not None and not evaluate_condition(self._where, resolution.data):
                return None
        except ExpressionError as error:
            text = f"must be a condition over fields, got {show(self._where.text if self._where else '')}: {error}"
            raise ConditionError(Problem(path=("sweep", "where"), text=text)) from error
        except Unresolved:
            pass  # The point has a wrong value, which is among its problems.
        spec, problems = validate(resolution)
        arm = ArmSpec.of(spec) if spec is not None and not problems else None
        view = View(resolution.data, elsewhere=self._elsewhere)
        return Candidate(point=point, arm=arm, problems=tuple(problems or find_problems(view)))

    def of_all(self, points: Iterable[Point], most: int) -> list[Candidate]:
        """The first `most` candidates of a grid or list.

        Raises:
            ConditionError: As `of`.
        """
        met = (candidate for point in points if (candidate := self.of(point)) is not None)
        return list(itertools.islice(met, most))

    def of_round(
        self, space: Space, number: int, told: Sequence[Told] = (), *, taken: Iterable[str] = (), greater: bool = False
    ) -> tuple[list[Candidate], int]:
        """The candidates of a round of a search, and how many points were drawn in vain.

        In the first round an arm that cannot work is among them, since the definition has to be mended; in later ones,
        that nobody can foresee, its point counts as refused.

        Args:
            space: What is searched.
            number: The round, from 0.
            told: What the earlier rounds gave.
            taken: Spec hashes of their arms.
            greater: Whether a greater primary metric is better.

        Raises:
            ConditionError: As `of`.
        """
        found: list[Candidate] = []
        hashes = set(taken)

        def accept(point: Point) -> Verdict:
            candidate = self.of(point)
            if candidate is None or (candidate.problems and number > 0):
                return "rejected"
            if candidate.arm is not None and candidate.arm.spec_hash in hashes:
                return "duplicate"
            if candidate.arm is not None:
                hashes.add(candidate.arm.spec_hash)
            found.append(candidate)
            return "good"

        asked = ask(space, number, told, greater_is_better=greater, accept=accept)
        return found, asked.rejected
