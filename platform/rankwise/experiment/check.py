"""From a document to a checked definition and its arms, with every problem that can be found at once.

The base definition is validated field by field first. If that holds, each point of the sweep is overlaid, its
expressions are evaluated, and fields and rules are checked again: `2*r` may be fine for one rank only. A definition
without a sweep is one point without overrides.

- The arms of a definition.
- Experiment files: read, overridden, checked. All problems are reported at once, each with file, line and key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.document import (
    MAX_BYTES,
    Document,
    KeyPath,
    Problem,
    dotted,
    read_document,
    read_value,
    secrets_in,
)
from rankwise.experiment.expressions import as_path, resolve
from rankwise.experiment.fields import show
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
from rankwise.experiment.rules import BUILT_IN_TEMPLATES, View, file_pin, find_problems, rung_problems, sweep_problems
from rankwise.experiment.schema import ExperimentSpec, greater_is_better
from rankwise.experiment.search import MAX_REJECTED, Point, Space, Told, TrialState
from rankwise.experiment.source import LocalSource, parse_source


@dataclass(kw_only=True)
class Checked:
    """The result: the definition and its arms when there are no problems."""

    spec: ExperimentSpec | None = None
    arms: tuple[ArmSpec, ...] = ()
    points: tuple[Point, ...] = ()
    problems: list[Problem] = field(default_factory=list)


def check(document: Document) -> Checked:
    """Check a whole definition. Of a search in rounds, the arms are those of the first round."""
    sweep = read_sweep(document)
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
    # A range's ends may be drawn by no arm of the first round, and must be good all the same.
    if sweep.space is not None and (values := _check_values(data, sweep.points, [])):
        return Checked(problems=values)
    spec._expressions = resolution.expressions
    spec._elsewhere = document.elsewhere
    checked = _check_arms(Candidates(data, sweep.where, elsewhere=document.elsewhere), sweep)
    checked.spec = spec
    checked.problems.extend(rung_problems(spec.sweep.early_stopping, checked.arms))
    return checked


def read_sweep(document: Document) -> Points:
    """The points of a document's sweep."""
    return read_points(document.data.get("sweep"), document.data.get("seed", 0))


def _with_first_point(data: dict[str, Any], first: Point) -> dict[str, Any]:
    """A field that only the sweep gives takes its first value, so that the definition is complete."""
    missing = {path: value for path, value in first.values.items() if not _given(data, path)}
    return overlay(data, missing) if missing else data


def _given(data: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(data, dict):
            return True
        if part not in data:
            return False
        data = data[part]
    return True


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
    return Checked(arms=tuple(arms), points=tuple(points), problems=problems)


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


Labelled = tuple[str, ArmSpec]


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """How an arm of a search ended.

    Attributes:
        state: Whether it has a value, was pruned or failed, or says nothing.
        value: The primary metric of a complete one.
        step: The last rung of a pruned one.
        at_step: Its value there.
    """

    state: TrialState
    value: float | None = None
    step: int | None = None
    at_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a search.

    Attributes:
        number: Counted from 0.
        arms: Its arms, each with what sets it apart.
        values: What the search chose for each, by dotted field path.
        rejected: Points that were drawn in vain.
    """

    number: int
    arms: tuple[Labelled, ...]
    values: tuple[Mapping[str, Any], ...]
    rejected: int


def expand(spec: ExperimentSpec) -> tuple[ArmSpec, ...]:
    """The arms of a definition, in the order of its grid or list; of a search in rounds, those of its first round.

    Raises:
        ConfigError: The definition was not made by the loader, or a file it names is gone or changed.
    """
    return tuple(arm for _, arm in labelled_arms(spec))


def labelled_arms(spec: ExperimentSpec) -> tuple[Labelled, ...]:
    """The arms, each with what sets it apart: `lora.r=8, seed=0`; empty for the only arm of a definition without sweep.

    Of a search in rounds these are the arms of its first round: the others depend on results (see `rounds`).

    Raises:
        ConfigError: As `expand`.
    """
    _, checked = _check(spec)
    return tuple((point.label, arm) for point, arm in zip(checked.points, checked.arms, strict=True))


def is_search(spec: ExperimentSpec) -> bool:
    """Whether arms depend on results, so that they cannot all be known before the first has ended."""
    return spec.sweep.method == "tpe"


def require_known_arms(spec: ExperimentSpec) -> None:
    """Refuse a definition whose arms depend on results.

    Raises:
        ConfigError: It is such a one.
    """
    if is_search(spec):
        raise ConfigError(
            f"sweep.method: tpe proposes the arms of {spec.name!r} round by round from results, so they cannot be "
            "submitted at once; `rankwise run FILE` drives the search (workers help it), or take method: random"
        )


def planned_rounds(spec: ExperimentSpec) -> tuple[int, ...]:
    """How many arms each round of a search is to have: one number for random, () where nothing is drawn."""
    space = read_sweep(Document(filename=spec.name, data=spec.document())).space
    return () if space is None else space.rounds


Results = Callable[[Sequence[ArmSpec]], Mapping[str, ArmResult]]
"""Given arms, what is known of them, by spec hash; an arm that has not ended is left out."""


def rounds(spec: ExperimentSpec, results_of: Results) -> tuple[Round, ...]:
    """The rounds of a search as far as results go: those that have ended, and the next one.

    They follow from the definition and the results alone: whoever knows the same results gets the same rounds.

    Args:
        spec: The definition.
        results_of: Asked for the arms of one round after the other. A round has ended when all of its arms have.

    Raises:
        ConfigError: As `expand`.
    """
    document, _ = _check(spec)
    sweep = read_sweep(document)
    assert sweep.space is not None, "not a search"
    candidates = Candidates(document.data, sweep.where, elsewhere=document.elsewhere)
    greater = greater_is_better(spec.evaluation.primary_metric)
    found: list[Round] = []
    told: list[Told] = []
    taken: set[str] = set()
    for number in range(len(sweep.space.rounds)):
        asked, rejected = candidates.of_round(sweep.space, number, told, taken=taken, greater=greater)
        if not asked:
            break
        values = tuple(candidate.point.values for candidate in asked)
        found.append(Round(number=number, arms=tuple(map(_labelled, asked)), values=values, rejected=rejected))
        arms = [arm for _, arm in found[-1].arms]
        hashes = [arm.spec_hash for arm in arms]
        results = results_of(arms)
        if not all(spec_hash in results for spec_hash in hashes):
            break
        taken.update(hashes)
        told += [
            Told(
                point=candidate.point,
                state=results[spec_hash].state,
                value=results[spec_hash].value,
                step=results[spec_hash].step,
                at_step=results[spec_hash].at_step,
            )
            for candidate, spec_hash in zip(asked, hashes, strict=True)
        ]
    return tuple(found)


def _check(spec: ExperimentSpec) -> tuple[Document, Checked]:
    document = Document(filename=spec.name, data=spec.document(), elsewhere=spec._elsewhere)
    checked = check(document)
    if checked.problems:
        raise document.error(checked.problems)
    return document, checked


def _labelled(candidate: Candidate) -> Labelled:
    assert candidate.arm is not None  # a rule of `of_round`: only in the first round, which has been checked
    return candidate.point.label, candidate.arm


_PATHS: tuple[KeyPath, ...] = (
    ("base_model",),
    ("base_model_config",),
    ("dataset", "train"),
    ("dataset", "eval"),
    ("dataset", "chat_template"),
)


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> ExperimentSpec:
    """Read and check an experiment file.

    Relative paths in the file are relative to its directory, those in an override to the working directory; the
    result has absolute ones, so that a worker in another directory finds the same files.

    Args:
        path: The YAML file.
        overrides: `key.path=value` texts, whose values are read as the file would read them.

    Raises:
        ConfigError: With every problem of the file, one a line: `FILE:LINE: key.path: what`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES:,} bytes: not an experiment file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a directory; give a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_experiment(text, str(path), overrides, directory=path.parent)


def parse_experiment(
    text: str,
    filename: str,
    overrides: Sequence[str] = (),
    *,
    directory: Path | None = None,
    elsewhere: bool = False,
) -> ExperimentSpec:
    """Check the text of an experiment file.

    Args:
        text: YAML.
        filename: For messages.
        overrides: As in `load_experiment`.
        directory: What its relative paths are relative to; the working directory by default.
        elsewhere: It was written down on another machine, so that base and rows need not be on this one.

    Raises:
        ConfigError: With every problem, one a line.
    """
    document, problems = read_document(text, filename)
    if problems and not document.data:
        raise document.error(problems)
    document.elsewhere = elsewhere
    problems.extend(_override(document, overrides))
    problems.extend(secrets_in(document))
    _make_paths_absolute(document, directory or Path.cwd())
    checked = check(document)
    problems.extend(checked.problems)
    if problems or checked.spec is None:
        raise document.error(problems)
    return checked.spec


def _override(document: Document, overrides: Sequence[str]) -> list[Problem]:
    """Lay `key.path=value` texts over the document."""
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path = _override_path(key.strip())
        document.lines = {
            known: line for known, line in document.lines.items() if known[: len(path)] != path or not path
        }
        document.lines[path] = None
        if not equals or not path:
            problems.append(Problem(path=(), text=f"must be KEY.PATH=VALUE, got {show(text)}"))
            document.lines[()] = None
            continue
        try:
            _set(document, path, read_value(value))
        except ValueError as error:
            problems.append(Problem(path=path, text=f"{show(value)} {error}"))
    return problems


def _override_path(key: str) -> KeyPath:
    """`training.max_steps` by its parts; after `sweep.parameters.` comes one key, which has dots itself."""
    axis = key.removeprefix("sweep.parameters.")
    if axis != key:
        return ("sweep", "parameters", axis)
    return tuple(key.split(".")) if key else ()


def _set(document: Document, path: KeyPath, value: Any) -> None:
    section: Any = document.data
    for depth, part in enumerate(path[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
            document.lines.setdefault(path[:depth], None)
        section = section[part]
        if not isinstance(section, dict):
            raise ValueError(f"cannot be set: {dotted(path[:depth])} is {show(section)}, not a mapping")
    section[path[-1]] = value


def _make_paths_absolute(document: Document, directory: Path) -> None:
    for path in _PATHS:
        section: Any = document.data
        for part in path[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or not isinstance(text := section.get(path[-1]), str) or not text:
            continue
        home = Path.cwd() if document.line(path) is None else directory
        if path[-1] == "chat_template" and text in BUILT_IN_TEMPLATES:
            continue
        if path[-1] in {"base_model_config", "chat_template"} or _is_path(text, home):
            section[path[-1]] = text = os.path.abspath(home / os.path.expanduser(text))
        if path[-1] == "chat_template" and os.path.isfile(text):
            # The hash covers what the template says, so a changed file is another arm. A file that cannot be read is
            # reported with the other problems.
            with suppress(OSError):
                section.setdefault("chat_template_revision", file_pin(text))


def _is_path(text: str, home: Path) -> bool:
    if text.startswith("pypi:"):
        return False
    try:
        local = isinstance(parse_source(text), LocalSource)
    except ValueError:
        local = False
    return local or os.path.exists(home / text)
