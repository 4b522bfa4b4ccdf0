"""Checks a document: the definition and its arms, or every problem that can be found at once.

The base definition is validated field by field first. If that holds, each point of the sweep is overlaid, its
expressions are evaluated, and fields and rules are checked again: `2*r` may be fine for one rank only. A definition
without a sweep is one point without overrides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.document import Document, Problem
from rankwise.experiment.expressions import resolve
from rankwise.experiment.fields import show
from rankwise.experiment.paths import KeyPath, as_path, dotted, follow
from rankwise.experiment.points import (
    MAX_ARMS,
    Candidate,
    Candidates,
    ConditionError,
    Points,
    overlay,
    read_points,
    validate,
)
from rankwise.experiment.rules import View, find_problems, rung_problems, sweep_problems
from rankwise.experiment.schema import ExperimentSpec, plain
from rankwise.experiment.search import MAX_REJECTED, Point, Space


@dataclass(kw_only=True)
class Checked:
    """The result: the definition and its arms when there are no problems."""

    spec: ExperimentSpec | None = None
    expressions: dict[str, str] = field(default_factory=dict)
    """Field paths that the document gives as an expression, with its text."""
    arms: tuple[ArmSpec, ...] = ()
    labels: tuple[str, ...] = ()
    """What sets each arm apart."""
    problems: list[Problem] = field(default_factory=list)


def check(document: Document) -> Checked:
    """Check a whole definition. Of a search in rounds, the arms are those of the first round."""
    sweep = read_sweep(document.data)
    data = _with_first_point(document.data, sweep.points[0] if sweep.points else Point())
    resolution = resolve(data)
    spec, problems = validate(resolution)
    problems = [*problems, *sweep.problems]
    wrong = [problem.path for problem in problems] + [as_path(path) for path in resolution.skipped]
    across = sweep_problems(View(resolution.data, wrong))
    if spec is None or problems or across:
        problems.extend(find_problems(View(resolution.data, wrong, elsewhere=document.elsewhere)))
        problems.extend(_check_values(data, sweep.points, [problem.path for problem in problems]))
        return Checked(problems=[*problems, *across])
    if sweep.space is not None:
        # A range's ends may be drawn by no arm of the first round, and must be good all the same.
        if values := _check_values(data, sweep.points, []):
            return Checked(problems=values)
        # Later rounds are drawn from the stored definition, whose numbers have one spelling: so is the first.
        sweep = read_sweep({**data, "sweep": plain(data["sweep"])})
    checked = _check_arms(Candidates(data, sweep.where, elsewhere=document.elsewhere), sweep)
    checked.spec = spec
    checked.expressions = resolution.expressions
    checked.problems.extend(rung_problems(spec.sweep.early_stopping, checked.arms))
    return checked


def read_sweep(data: Mapping[str, Any]) -> Points:
    """The points of a definition's sweep."""
    return read_points(data.get("sweep"), data.get("seed", 0))


def _with_first_point(data: dict[str, Any], first: Point) -> dict[str, Any]:
    """A field that only the sweep gives takes its first value, so that the definition is complete."""
    missing = {path: value for path, value in first.values.items() if not _given(data, path)}
    return overlay(data, missing) if missing else data


def _given(data: dict[str, Any], path: str) -> bool:
    key = as_path(path)
    reached, value = follow(data, key)
    return reached == len(key) or not isinstance(value, dict)


def _check_values(data: dict[str, Any], points: Iterable[Point], wrong: list[KeyPath]) -> list[Problem]:
    """Each value of a sweep by itself, where the base definition is not good enough to make arms of."""
    problems: dict[KeyPath, Problem] = {}
    for point in points:
        for path, value in point.values.items():
            place = point.places[path]
            if place in problems or place in wrong or not _given_mapping(data, path):
                continue
            resolution = resolve(overlay(data, {path: value}))
            _, found = validate(resolution)
            key = as_path(path)
            for problem in found:
                if problem.path[: len(key)] == key:
                    problems[place] = Problem(path=place, text=problem.text)
    return list(problems.values())


def _given_mapping(data: Any, path: str) -> bool:
    """Whether a value can be laid over the data at all: nothing on the way is something other than a mapping."""
    return isinstance(follow(data, as_path(path)[:-1])[1], dict)


@dataclass(kw_only=True)
class _Found:
    """One problem, and the arms that have it."""

    problem: Problem
    labels: list[str] = field(default_factory=list)


def _check_arms(candidates: Candidates, sweep: Points) -> Checked:
    try:
        if sweep.space is None:
            met = candidates.of_all(sweep.points, MAX_ARMS + 1)
        else:
            met, _ = candidates.of_round(sweep.space, 0)
    except ConditionError as error:
        return Checked(problems=[error.problem])
    if len(met) > MAX_ARMS:
        text = f"has more than {MAX_ARMS:,} arms; leave out values, or narrow it with where"
        return Checked(problems=[Problem(path=("sweep",), text=text)])
    if not met:
        tried = f"{len(sweep.points)} arms" if sweep.space is None else f"{MAX_REJECTED:,} points that were tried"
        text = f"leaves none of the {tried}, got {show(sweep.where.text if sweep.where else '')}"
        return Checked(problems=[Problem(path=("sweep", "where"), text=text)])
    if found := _problems(met):
        return Checked(problems=found)
    arms = [candidate.arm for candidate in met if candidate.arm is not None]
    points = [candidate.point for candidate in met]
    problems = _duplicates(arms, points) if sweep.space is None else _missing(sweep.space, len(met))
    return Checked(arms=tuple(arms), labels=tuple(_label(point, sweep.space) for point in points), problems=problems)


def _label(point: Point, space: Space | None) -> str:
    """The label of a checked point: 16.0 in a grid's list is 16, what a search has drawn stays as it is."""
    return (point if space is not None else replace(point, values=plain(point.values))).label


def _problems(candidates: Sequence[Candidate]) -> list[Problem]:
    """What is wrong with arms, each problem once, with the arms that have it."""
    found: dict[tuple[KeyPath, str], _Found] = {}
    for candidate in candidates:
        for problem in candidate.problems:
            place = _place(problem.path, candidate.point)
            entry = found.setdefault((place, problem.text), _Found(problem=Problem(path=place, text=problem.text)))
            entry.labels.append(candidate.point.label)
    return [_named(entry, len(candidates)) for entry in found.values()]


def _missing(space: Space, found: int) -> list[Problem]:
    """Whether the first round of a search is smaller than it should be."""
    wanted = space.rounds[0]
    if found == wanted:
        return []
    text = f"asks for {space.trials:,} arms, but only {found:,} that differ were found"
    return [Problem(path=("sweep", "trials"), text=f"{text}; ask for fewer, or widen the ranges or where")]


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
