"""Checks a definition and its arms, and reports all problems at once.

1. Validate the base definition field by field.
2. If it is valid, overlay each point of the sweep, evaluate its expressions, and check fields and rules again, since
   `2*r` may be valid for one rank only. A definition without a sweep is one point without overrides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.document import Document, Problem
from rankwise.experiment.expressions import Expression, Resolution, resolve
from rankwise.experiment.fields import show
from rankwise.experiment.hashing import plain
from rankwise.experiment.paths import KeyPath, as_path, dotted, follow
from rankwise.experiment.points import (
    MAX_ARMS,
    ArmCandidate,
    CandidateBuilder,
    ConditionError,
    SweepPoints,
    overlay,
    read_points,
    validate,
)
from rankwise.experiment.rules import FieldView, adds_seeds, find_problems, rung_problems, sweep_problems
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.search import MAX_REJECTED, SearchSpace, SweepPoint


@dataclass(kw_only=True)
class CheckedDefinition:
    """The definition and its arms, or problems."""

    spec: ExperimentSpec | None = None
    expressions: dict[str, str] = field(default_factory=dict)
    """The text of each expression, by field path."""
    arms: tuple[ArmSpec, ...] = ()
    labels: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)


def check(document: Document) -> CheckedDefinition:
    """Check a whole definition. In a search with rounds, the arms are those of the first round."""
    sweep = read_sweep(document.data)
    data = _with_first_point(document.data, sweep.points[0] if sweep.points else SweepPoint())
    resolution = resolve(data)
    spec, problems = validate(resolution)
    problems = [*problems, *sweep.problems]
    wrong = [problem.path for problem in problems] + [as_path(path) for path in resolution.skipped]
    across = sweep_problems(FieldView(resolution.data, wrong))
    if spec is None or problems or across:
        problems.extend(find_problems(FieldView(resolution.data, wrong, elsewhere=document.elsewhere)))
        problems.extend(_check_values(data, sweep.points, [problem.path for problem in problems]))
        return CheckedDefinition(problems=[*problems, *across])
    if sweep.space is not None:
        # The ends of a range must be valid even if no arm of the first round draws them.
        if values := _check_values(data, sweep.points, []):
            return CheckedDefinition(problems=values)
        # Later rounds are drawn from the stored definition, whose numbers are normalized; the first must be too.
        sweep = read_sweep({**data, "sweep": plain(data["sweep"])})
    checked = _check_arms(CandidateBuilder(data, sweep.where, elsewhere=document.elsewhere), sweep)
    checked.spec = spec
    checked.expressions = resolution.expressions
    checked.problems.extend(rung_problems(spec.sweep.early_stopping, checked.arms))
    checked.problems.extend(_seed_problems(spec, checked.arms, resolution, sweep.where))
    return checked


def read_sweep(data: Mapping[str, Any]) -> SweepPoints:
    """Read the points of a definition's sweep."""
    sweep, problems = _without_missing_sources(data)
    points = read_points(sweep, data.get("seed", 0))
    return replace(points, problems=(*problems, *points.problems)) if problems else points


def _without_missing_sources(data: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """The sweep without axes over sources that are not in the list, and a problem for each of these."""
    sweep = data.get("sweep")
    if not isinstance(sweep, dict):
        return sweep, []
    problems: list[Problem] = []

    def known(values: Any, place: KeyPath) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for path, value in values.items():
            key = as_path(path) if isinstance(path, str) else ()
            if any(isinstance(part, int) for part in key) and not isinstance(follow(data, key[:-1])[1], dict):
                listed = follow(data, ("dataset", "train"))[1]
                count = f"has {len(listed)} sources" if isinstance(listed, list) else "is not a list of sources"
                problems.append(Problem(path=(*place, path), text=f"does not exist: dataset.train {count}"))
                continue
            kept[path] = value
        return kept

    changed = {**sweep}
    if "parameters" in sweep:
        changed["parameters"] = known(sweep["parameters"], ("sweep", "parameters"))
    if isinstance(sweep.get("arms"), list):
        changed["arms"] = [known(arm, ("sweep", "arms", index)) for index, arm in enumerate(sweep["arms"])]
    return changed, problems


def _with_first_point(data: dict[str, Any], first: SweepPoint) -> dict[str, Any]:
    """Set fields that only the sweep sets to their first value, so that the definition is complete."""
    missing = {path: value for path, value in first.values.items() if not _is_set(data, path)}
    return overlay(data, missing) if missing else data


def _is_set(data: dict[str, Any], path: str) -> bool:
    key = as_path(path)
    reached, value = follow(data, key)
    return reached == len(key) or not isinstance(value, dict)


def _check_values(data: dict[str, Any], points: Iterable[SweepPoint], wrong: list[KeyPath]) -> list[Problem]:
    """Check each value of a sweep on its own, when the base definition is too broken to build arms."""
    problems: dict[KeyPath, Problem] = {}
    for point in points:
        for path, value in point.values.items():
            place = point.places[path]
            if place in problems or place in wrong or not _can_overlay(data, path):
                continue
            resolution = resolve(overlay(data, {path: value}))
            _, value_problems = validate(resolution)
            key = as_path(path)
            for problem in value_problems:
                if problem.path[: len(key)] == key:
                    problems[place] = Problem(path=place, text=problem.text)
    return list(problems.values())


def _can_overlay(data: Any, path: str) -> bool:
    """Whether everything above a field is a mapping, so that a value can be set there."""
    return isinstance(follow(data, as_path(path)[:-1])[1], dict)


def _seed_problems(
    spec: ExperimentSpec, arms: Sequence[ArmSpec], resolution: Resolution, where: Expression | None
) -> list[Problem]:
    """Problems of seeds on demand: too many arms, and what differs between seeds in more than the seed."""
    if not adds_seeds(spec, arms):
        return []
    assert spec.answer is not None
    advice = "give sweep.parameters.seed a list of seeds, which are evaluated one by one"
    dependent = [as_path(path) for path, fields in resolution.dependencies.items() if "seed" in fields]
    dependent += [("sweep", "where")] if where is not None and "seed" in where.names else []
    problems = [Problem(path=path, text=f"depends on seed, and answer adds seeds; {advice}") for path in dependent]
    if "seed" in resolution.expressions:
        problems.append(Problem(path=("seed",), text=f"must be a number, since answer adds seeds from it on; {advice}"))
    seeds = spec.answer.seeds
    most = len(arms) * (max(seeds.most, seeds.pilot) if spec.answer.tune else seeds.most)
    if most > MAX_ARMS:
        text = f"gives up to {most:,} arms, {len(arms):,} for each seed; at most {MAX_ARMS:,} are allowed"
        problems.append(Problem(path=("answer", "seeds", "most"), text=text))
    return problems


@dataclass(kw_only=True)
class _ArmProblem:
    """A problem, and the labels of the arms that have it."""

    problem: Problem
    labels: list[str] = field(default_factory=list)


def _check_arms(candidates: CandidateBuilder, sweep: SweepPoints) -> CheckedDefinition:
    try:
        if sweep.space is None:
            met = candidates.of_all(sweep.points, MAX_ARMS + 1)
        else:
            met, _ = candidates.of_round(sweep.space, 0)
    except ConditionError as error:
        return CheckedDefinition(problems=[error.problem])
    if len(met) > MAX_ARMS:
        text = f"has more than {MAX_ARMS:,} arms; remove values, or narrow it with where"
        return CheckedDefinition(problems=[Problem(path=("sweep",), text=text)])
    if not met:
        tried = f"{len(sweep.points)} arms" if sweep.space is None else f"{MAX_REJECTED:,} points tried"
        text = f"excludes all {tried}, got {show(sweep.where.text if sweep.where else '')}"
        return CheckedDefinition(problems=[Problem(path=("sweep", "where"), text=text)])
    if arm_problems := _problems(met):
        return CheckedDefinition(problems=arm_problems)
    arms = [candidate.arm for candidate in met if candidate.arm is not None]
    points = [candidate.point for candidate in met]
    problems = _duplicates(arms, points) if sweep.space is None else _missing(sweep.space, len(met))
    return CheckedDefinition(
        arms=tuple(arms), labels=tuple(_label(point, sweep.space) for point in points), problems=problems
    )


def _label(point: SweepPoint, space: SearchSpace | None) -> str:
    """The label of a checked point: 16.0 in a grid becomes 16; drawn values stay as they are."""
    return (point if space is not None else replace(point, values=plain(point.values))).label


def _problems(candidates: Sequence[ArmCandidate]) -> list[Problem]:
    """The problems of all arms, each once, with the arms that have it."""
    entries: dict[tuple[KeyPath, str], _ArmProblem] = {}
    for candidate in candidates:
        for problem in candidate.problems:
            place = _place(problem.path, candidate.point)
            entry = entries.setdefault(
                (place, problem.text), _ArmProblem(problem=Problem(path=place, text=problem.text))
            )
            entry.labels.append(candidate.point.label)
    return [_named(entry, len(candidates)) for entry in entries.values()]


def _missing(space: SearchSpace, drawn: int) -> list[Problem]:
    """A problem if the first round of a search has too few arms."""
    wanted = space.rounds[0]
    if drawn == wanted:
        return []
    text = f"is {space.trials:,}, but only {drawn:,} different arms were found"
    return [Problem(path=("sweep", "trials"), text=f"{text}; reduce it, or widen the ranges or where")]


def _place(path: KeyPath, point: SweepPoint) -> KeyPath:
    """The place of an arm's problem in the file: the sweep's value, if the sweep set the field."""
    for length in range(len(path), 0, -1):
        head = dotted(path[:length])
        if head in point.places:
            return (*point.places[head], *path[length:])
    return path


def _named(entry: _ArmProblem, arms: int) -> Problem:
    """Add which arms have a problem, unless all do or its place shows it."""
    labels = entry.labels
    at_value = entry.problem.path[:1] == ("sweep",) and len({*labels}) == 1
    if len(labels) == arms or at_value:
        return entry.problem
    which = f"in the arm {labels[0]}" if len(labels) == 1 else f"in {len(labels)} arms, first {labels[0]}"
    return Problem(path=entry.problem.path, text=f"{entry.problem.text} ({which})")


def _duplicates(arms: list[ArmSpec], points: list[SweepPoint]) -> list[Problem]:
    """Report arms with equal hashes: the second run would be skipped silently."""
    first: dict[str, SweepPoint] = {}
    problems = []
    for arm, point in zip(arms, points, strict=True):
        if (other := first.setdefault(arm.spec_hash, point)) is not point:
            one, two = (label or "no override" for label in (other.label, point.label))
            text = f"({one}) and ({two}) are the same arm: they differ in nothing that influences the result"
            problems.append(Problem(path=point.home, text=f"{text}; remove one, or exclude it with where"))
    return problems
