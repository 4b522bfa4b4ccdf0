"""From a document to a checked definition and its arms, with every problem that can be found at once.

The base definition is validated field by field first. If that holds, each point of the sweep is overlaid, its
expressions are evaluated, and fields and rules are checked again: `2*r` may be fine for one rank only. A definition
without a sweep is one point without overrides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.document import Document, KeyPath, Problem, dotted
from rankwise.experiment.expressions import ExpressionError
from rankwise.experiment.fields import allowed, did_you_mean, keys, node_at, options, show, unknown_key
from rankwise.experiment.points import MAX_ARMS, Point, Points, read_points
from rankwise.experiment.resolve import Resolution, Unresolved, as_path, evaluate_condition, resolve
from rankwise.experiment.rules import View, find_problems
from rankwise.experiment.schema import ExperimentSpec

# Branches of the union dataset.eval, which pydantic puts into an error's place.
_TAGS = {"source", "split"}


@dataclass(kw_only=True)
class Checked:
    """The result: the definition and its arms when there are no problems."""

    spec: ExperimentSpec | None = None
    arms: tuple[ArmSpec, ...] = ()
    points: tuple[Point, ...] = ()
    problems: list[Problem] = field(default_factory=list)


def check(document: Document) -> Checked:
    """Check a whole definition."""
    sweep = read_points(document.data.get("sweep"))
    data = _with_first_point(document.data, sweep.points[0] if sweep.points else Point())
    resolution = resolve(data)
    spec, problems = _validate(resolution)
    problems = [*problems, *sweep.problems]
    if spec is None or problems:
        wrong = [problem.path for problem in problems] + [as_path(path) for path in resolution.skipped]
        problems.extend(find_problems(View(resolution.data, wrong)))
        problems.extend(_check_values(data, sweep.points, [problem.path for problem in problems]))
        return Checked(problems=problems)
    spec._expressions = resolution.expressions
    checked = _check_arms(data, sweep)
    checked.spec = spec
    return checked


def _with_first_point(data: dict[str, Any], first: Point) -> dict[str, Any]:
    """A field that only the sweep gives takes its first value, so that the definition is complete."""
    missing = {path: value for path, value in first.values.items() if not _given(data, path)}
    return _overlay(data, missing) if missing else data


def _given(data: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(data, dict):
            return True
        if part not in data:
            return False
        data = data[part]
    return True


def _overlay(data: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(data)
    for path, value in values.items():
        *parents, leaf = path.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = copy.deepcopy(value)
    return result


def _validate(resolution: Resolution) -> tuple[ExperimentSpec | None, list[Problem]]:
    """Check every field by itself."""
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


def _check_values(data: dict[str, Any], points: Iterable[Point], wrong: list[KeyPath]) -> list[Problem]:
    """Each value of a sweep by itself, where the base definition is not good enough to make arms of."""
    problems: dict[KeyPath, Problem] = {}
    for point in points:
        for path, value in point.values.items():
            place = point.places[path]
            if place in problems or place in wrong or not _given_mapping(data, path):
                continue
            resolution = resolve(_overlay(data, {path: value}))
            _, found = _validate(resolution)
            key = as_path(path)
            for problem in found:
                if problem.path[: len(key)] == key:
                    problems[place] = Problem(path=place, text=problem.text)
    return list(problems.values())


def _given_mapping(data: Any, path: str) -> bool:
    """Whether a value can be laid over the data at all: nothing on the way is something other than a mapping."""
    for part in path.split(".")[:-1]:
        data = data.get(part, {})
        if not isinstance(data, dict):
            return False
    return True


@dataclass(kw_only=True)
class _Found:
    """One problem, and the arms that have it."""

    problem: Problem
    labels: list[str] = field(default_factory=list)


def _check_arms(data: dict[str, Any], sweep: Points) -> Checked:
    base = {key: value for key, value in data.items() if key != "sweep"}
    found: dict[tuple[KeyPath, str], _Found] = {}
    arms: list[ArmSpec] = []
    kept: list[Point] = []
    met = 0
    for point in sweep.points:
        resolution = resolve(_overlay(base, point.values))
        try:
            if sweep.where is not None and not evaluate_condition(sweep.where, resolution.data):
                continue
        except ExpressionError as error:
            text = f"must be a condition over fields, got {show(sweep.where.text if sweep.where else '')}: {error}"
            return Checked(problems=[Problem(path=("sweep", "where"), text=text)])
        except Unresolved:
            pass  # The point has a wrong value, which is reported just below.
        met += 1
        if met > MAX_ARMS:
            text = f"has more than {MAX_ARMS:,} arms; leave out values, or narrow it with where"
            return Checked(problems=[Problem(path=("sweep",), text=text)])
        spec, problems = _validate(resolution)
        for problem in problems or find_problems(View(resolution.data)):
            place = _place(problem.path, point)
            entry = found.setdefault((place, problem.text), _Found(problem=Problem(path=place, text=problem.text)))
            entry.labels.append(point.label)
        if spec is not None and not problems:
            arms.append(ArmSpec.of(spec))
            kept.append(point)
    if met == 0:
        text = f"leaves none of the {len(sweep.points)} arms, got {show(sweep.where.text if sweep.where else '')}"
        return Checked(problems=[Problem(path=("sweep", "where"), text=text)])
    if found:
        return Checked(problems=[_named(entry, met) for entry in found.values()])
    return Checked(arms=tuple(arms), points=tuple(kept), problems=_duplicates(arms, kept))


def _place(path: KeyPath, point: Point) -> KeyPath:
    """Where a problem of an arm stands in the file: at the sweep's value when the sweep set that field."""
    for length in range(len(path), 0, -1):
        head = dotted(path[:length])
        if head in point.places:
            return (*point.places[head], *path[length:])
    return path


def _named(entry: _Found, arms: int) -> Problem:
    """Say which arms have a problem, unless all do or its place says it."""
    labels = entry.labels
    at_value = entry.problem.path[:1] == ("sweep",) and len({*labels}) == 1
    if len(labels) == arms or at_value:
        return entry.problem
    which = f"in the arm {labels[0]}" if len(labels) == 1 else f"in {len(labels)} arms, first {labels[0]}"
    return Problem(path=entry.problem.path, text=f"{entry.problem.text} ({which})")


def _duplicates(arms: list[ArmSpec], points: list[Point]) -> list[Problem]:
    """Two arms with one hash are one arm: its second run would be skipped without a word."""
    first: dict[str, Point] = {}
    problems = []
    for arm, point in zip(arms, points, strict=True):
        if (other := first.setdefault(arm.spec_hash, point)) is not point:
            one, two = (label or "no override" for label in (other.label, point.label))
            text = f"({one}) and ({two}) are the same arm: equal in all that influences the result"
            problems.append(Problem(path=point.home, text=f"{text}; remove one, or exclude it with where"))
    return problems
