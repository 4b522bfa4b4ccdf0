"""The points of a sweep, and the arms they become.

1. Read the `sweep` section into points: which fields each arm overrides, and with which values.
2. Overlay a point on the definition, evaluate expressions, apply `where`, and check fields and rules.
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
    is_sweepable,
    keys,
    leaves,
    node_at,
    options,
    show,
    sweepable,
    unknown_key,
)
from rankwise.experiment.hashing import plain
from rankwise.experiment.paths import KeyPath, as_path, dotted, put
from rankwise.experiment.rules import FieldView, find_problems
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.search import (
    SEARCHES,
    Acceptance,
    SearchSpace,
    SweepAxis,
    SweepPoint,
    Trial,
    bare,
    method_of,
    propose,
    read_axis,
    read_space,
    sample_points,
)

MAX_POINTS = 10_000
"""Points of a grid, before `where`."""
MAX_ARMS = 1_000


@dataclass(frozen=True, kw_only=True)
class SweepPoints:
    """The content of a sweep section, and its problems.

    `points` are those of a grid or list; in a search, samples that cover every choice and both ends of every range, and
    `space` is what points are drawn from.
    """

    points: tuple[SweepPoint, ...] = (SweepPoint(),)
    where: Expression | None = None
    space: SearchSpace | None = None
    problems: tuple[Problem, ...] = ()


def read_points(sweep: Any, seed: Any = 0) -> SweepPoints:
    """Read the raw `sweep` section; the schema reports wrong types.

    `seed` is the definition's seed, for a search without one.
    """
    if not isinstance(sweep, dict):
        return SweepPoints()
    problems: list[Problem] = []
    where = _condition(sweep.get("where"), problems)
    parameters, arms = sweep.get("parameters", {}), sweep.get("arms", [])
    if parameters and arms:
        text = "cannot be combined with parameters; give a grid (parameters) or a list (arms)"
        problems.append(Problem(path=("sweep", "arms"), text=text))
    searches = method_of(sweep) in SEARCHES
    axes = _axes(parameters, searches, problems) if isinstance(parameters, dict) else []
    space = read_space(sweep, axes, seed, problems)
    if searches:
        return SweepPoints(points=sample_points(axes), where=where, space=space, problems=tuple(problems))
    listed = _arms(arms, problems) if isinstance(arms, list) else []
    points = tuple(listed) or _grid({axis.path: list(axis.choices) for axis in axes}, problems)
    return SweepPoints(points=points, where=where, problems=tuple(problems))


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


def _axes(parameters: dict[str, Any], searches: bool, problems: list[Problem]) -> list[SweepAxis]:
    axes = []
    for path, values in parameters.items():
        place: KeyPath = ("sweep", "parameters", path)
        if problem := _not_swept(path):
            problems.append(Problem(path=place, text=problem))
        elif isinstance(values, dict) and not searches:
            text = f"is a range, got {show(values)}; a grid needs a list of values, a range needs method: random or tpe"
            problems.append(Problem(path=place, text=text))
        elif not isinstance(values, list) and not searches:
            text = f"must be a list of values, got {show(values)}; did you mean [{bare(values)}]?"
            problems.append(Problem(path=place, text=text))
        elif (axis := read_axis(path, values, problems)) is not None and _check_choices(axis, problems):
            axes.append(axis)
    return axes


def _check_choices(axis: SweepAxis, problems: list[Problem]) -> bool:
    if axis.kind != "choice":
        return True
    if not axis.choices:
        problems.append(Problem(path=axis.place, text="must have at least one value, got []"))
        return False
    seen: set[bytes] = set()
    for index, value in enumerate(axis.choices):
        if (spelling := _normalized(axis.path, value)) in seen:
            problems.append(Problem(path=(*axis.place, index), text=f"{show(value)} is listed twice; remove one"))
        seen.add(spelling)
    return True


def _grid(axes: dict[str, list[Any]], problems: list[Problem]) -> tuple[SweepPoint, ...]:
    size = 1
    for values in axes.values():
        size *= len(values)
    if size > MAX_POINTS:
        text = f"give a grid of {size:,} points; at most {MAX_POINTS:,} are allowed"
        problems.append(Problem(path=("sweep", "parameters"), text=text))
        return (SweepPoint(),)
    home: KeyPath = ("sweep", "parameters") if axes else ("sweep",)
    return tuple(
        SweepPoint(
            values={path: axes[path][index] for path, index in zip(axes, indices, strict=True)},
            places={path: ("sweep", "parameters", path, index) for path, index in zip(axes, indices, strict=True)},
            home=home,
            fixed=frozenset(path for path, values in axes.items() if len(values) == 1),
        )
        for indices in itertools.product(*(range(len(values)) for values in axes.values()))
    )


def _arms(arms: list[Any], problems: list[Problem]) -> list[SweepPoint]:
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
        wrong = {path: problem for path in values if (problem := _not_swept(path))}
        problems.extend(Problem(path=(*home, path), text=problem) for path, problem in wrong.items())
        valid = {path: value for path, value in values.items() if path not in wrong}
        points.append(SweepPoint(values=valid, places={path: (*home, path) for path in valid}, home=home))
    return points


def _not_swept(path: str) -> str | None:
    """Why a field cannot be swept, or None."""
    fields = sweepable()
    if is_sweepable(path):
        return None
    if path in leaves():
        return f"cannot differ between arms; allowed: {', '.join(_groups())}"
    hint = did_you_mean(path, fields, elsewhere=fields)
    return f"cannot be swept{hint}; allowed: {', '.join(_groups())}"


def _groups() -> tuple[str, ...]:
    return (
        "lora.*", "training.*", "quantization.*", "dataset.limit.train", "dataset.train", "dataset.train[N].weight",
        "dataset.train[N].rows", "dataset.train[N].source", "seed",
    )  # fmt: skip


def _normalized(path: str, value: Any) -> bytes:
    """The same bytes for equal settings: 16 and 16.0, or modules in any order."""
    if path == "lora.target_modules" and isinstance(value, list):
        value = sorted(map(str, value))
    return canonical_json(plain(value))


# Branches of the unions dataset.train and dataset.eval, which pydantic adds to an error's location.
_TAGS = {"source", "sources", "split"}


def overlay(data: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of plain data with some fields changed, given by dotted path."""
    result = copy.deepcopy(data)
    for path, value in values.items():
        put(result, as_path(path), copy.deepcopy(value))
    return result


def validate(resolution: Resolution) -> tuple[ExperimentSpec | None, list[Problem]]:
    """Validate resolved data: the definition, or None, and the problems."""
    try:
        spec = ExperimentSpec.model_validate(resolution.data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        problems = [_translate(detail, resolution) for detail in details]
        reported = {problem.path for problem in resolution.problems} | {as_path(path) for path in resolution.skipped}
        wrong = {dotted(problem.path) for problem in problems}
        # With r = 0, an alpha of 2*r is invalid too, but only because of r.
        reported |= {as_path(path) for path, fields in resolution.dependencies.items() if fields & wrong}
        return None, [*resolution.problems, *(problem for problem in problems if problem.path not in reported)]
    return spec, list(resolution.problems)


def _translate(error: ErrorDetails, resolution: Resolution) -> Problem:
    path = tuple(part for part in error["loc"])
    if path[:2] in {("dataset", "eval"), ("dataset", "train")} and path[2:3] and path[2] in _TAGS:
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
    """Raised when `where` cannot be evaluated for a point; holds the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class ArmCandidate:
    """A point that meets the condition, with its arm, or None and the problems at the paths of the arm's fields."""

    point: SweepPoint
    arm: ArmSpec | None
    problems: tuple[Problem, ...]


class CandidateBuilder:
    """Builds candidates from a definition and the points of its sweep."""

    def __init__(self, data: dict[str, Any], where: Expression | None, *, elsewhere: bool = False) -> None:
        """Build from `data` without its sweep; `where` is the sweep's condition, `elsewhere` as in `FieldView`."""
        self._elsewhere = elsewhere
        self._base = {key: value for key, value in data.items() if key != "sweep"}
        self._where = where

    def of(self, point: SweepPoint) -> ArmCandidate | None:
        """The candidate of a point, or None if `where` excludes it.

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
            pass  # The point has an invalid value, which `validate` reports.
        spec, problems = validate(resolution)
        problems = problems or list(find_problems(FieldView(resolution.data, elsewhere=self._elsewhere)))
        arm = ArmSpec.of(spec) if spec is not None and not problems else None
        return ArmCandidate(point=point, arm=arm, problems=tuple(problems))

    def of_all(self, points: Iterable[SweepPoint], most: int) -> list[ArmCandidate]:
        """Up to `most` candidates of a grid or list."""
        met = (candidate for point in points if (candidate := self.of(point)) is not None)
        return list(itertools.islice(met, most))

    def of_round(
        self,
        space: SearchSpace,
        number: int,
        history: Sequence[Trial] = (),
        *,
        known: Iterable[str] = (),
        greater: bool = False,
    ) -> tuple[list[ArmCandidate], int]:
        """The candidates of a round of a search, and how many drawn points were discarded.

        The first round includes invalid arms, so that their problems are reported and the definition can be fixed.
        Points of later rounds cannot be foreseen, so invalid ones are rejected. `known` holds the spec hashes of the
        arms of earlier rounds, `history` their results.
        """
        candidates: list[ArmCandidate] = []
        hashes = set(known)

        def accept(point: SweepPoint) -> Acceptance:
            candidate = self.of(point)
            if candidate is None or (candidate.problems and number > 0):
                return "rejected"
            if candidate.arm is not None and candidate.arm.spec_hash in hashes:
                return "duplicate"
            if candidate.arm is not None:
                hashes.add(candidate.arm.spec_hash)
            candidates.append(candidate)
            return "good"

        proposal = propose(space, number, history, greater_is_better=greater, accept=accept)
        return candidates, proposal.rejected
