"""The `Experiment`: a checked definition and its arms, built once from a file or text and passed along.

It crosses to another process as plain data and is rebuilt there without being checked again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.check import check, read_sweep
from rankwise.experiment.document import (
    MAX_BYTES,
    Document,
    Problem,
    read_document,
    read_value,
    secrets_in,
    to_yaml,
)
from rankwise.experiment.fields import is_source, show
from rankwise.experiment.hashing import plain
from rankwise.experiment.metric_names import greater_is_better
from rankwise.experiment.paths import KeyPath, as_path, dotted, follow, put
from rankwise.experiment.points import ArmCandidate, CandidateBuilder, SweepPoints, overlay
from rankwise.experiment.rules import BUILT_IN_TEMPLATES, adds_seeds, file_pin
from rankwise.experiment.schema import DatasetSpec, ExperimentSpec, Revisions
from rankwise.experiment.search import Trial, TrialState
from rankwise.experiment.source import LocalSource, parse_source

Labelled = tuple[str, ArmSpec]
"""An arm with its label: `lora.r=8, seed=0`, or empty for the only arm of a definition without a sweep."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """How an arm of a search ended.

    A complete arm has a `value` of the primary metric; a pruned one has its last rung as `step`, and its value
    `at_step`.
    """

    state: TrialState
    value: float | None = None
    step: int | None = None
    at_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchRound:
    """One round of a search, numbered from 0.

    `values` holds what the search chose for each arm, by dotted field path. `rejected` counts the drawn points that
    were discarded.
    """

    number: int
    arms: tuple[Labelled, ...]
    values: tuple[Mapping[str, Any], ...]
    rejected: int


Results = Callable[[Sequence[ArmSpec]], Mapping[str, ArmResult]]
"""Returns the results of the given arms by spec hash, without arms that have not ended."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A checked definition and its arms, built by `load_experiment` or `parse_experiment`.

    Attributes:
        spec: The definition, with numbers in place of expressions.
        labelled_arms: Arms in the order of the grid or list. In a search with rounds, only those of the first round;
            the others depend on results (see `rounds`).
        expressions: The text of each expression, by field path: {"lora.lora_alpha": "2*r"}.
        elsewhere: Whether the definition comes from another machine, so that base and data need not exist on this one.
    """

    spec: ExperimentSpec
    labelled_arms: tuple[Labelled, ...]
    expressions: Mapping[str, str] = field(default_factory=dict)
    elsewhere: bool = False

    @property
    def arms(self) -> tuple[ArmSpec, ...]:
        """The arms without labels."""
        return tuple(arm for _, arm in self.labelled_arms)

    @property
    def is_search(self) -> bool:
        """Whether later arms depend on the results of earlier ones."""
        return self.spec.sweep.method == "tpe"

    @property
    def adds_seeds(self) -> bool:
        """Whether seeds are trained on demand."""
        return adds_seeds(self.spec, self.arms)

    @property
    def planned_rounds(self) -> tuple[int, ...]:
        """Planned number of arms per round of a search: one number for random, () without a search."""
        space = self._points.space
        return () if space is None else space.rounds

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """The whole definition as plain data, with defaults, and expressions as text."""
        data: dict[str, Any] = plain(self.spec.model_dump(mode="json", by_alias=True))
        return overlay(data, dict(self.expressions))

    @cached_property
    def text(self) -> str:
        """The whole definition as the text of an experiment file that gives the same arms."""
        return to_yaml(dict(self.document))

    @cached_property
    def _points(self) -> SweepPoints:
        return read_sweep(self.document)

    def require_known_arms(self) -> None:
        """Check that no arm depends on results.

        Raises:
            ConfigError: The sweep is a tpe search.
        """
        if self.is_search:
            raise ConfigError(
                f"sweep.method: tpe proposes the arms of {self.spec.name!r} round by round from results, so they "
                "cannot all be submitted now; run the search with `rankwise run FILE` (workers can help), or use "
                "method: random"
            )

    def rounds(self, results_of: Results) -> tuple[SearchRound, ...]:
        """The rounds of a search that have ended, and the next one.

        They depend only on the definition and the results, so any process with the same results gets the same rounds.
        A round has ended when `results_of` returns a result for each of its arms; it is called once per round.
        """
        space = self._points.space
        assert space is not None, "not a search"
        candidates = CandidateBuilder(dict(self.document), self._points.where, elsewhere=self.elsewhere)
        greater = greater_is_better(self.spec.evaluation.primary_metric)
        rounds: list[SearchRound] = []
        trials: list[Trial] = []
        known: set[str] = set()
        for number in range(len(space.rounds)):
            proposed, rejected = candidates.of_round(space, number, trials, known=known, greater=greater)
            if not proposed:
                break
            values = tuple(candidate.point.values for candidate in proposed)
            rounds.append(
                SearchRound(number=number, arms=tuple(map(_labelled, proposed)), values=values, rejected=rejected)
            )
            arms = [arm for _, arm in rounds[-1].arms]
            hashes = [arm.spec_hash for arm in arms]
            results = results_of(arms)
            if not all(spec_hash in results for spec_hash in hashes):
                break
            known.update(hashes)
            trials += [
                Trial(
                    point=candidate.point,
                    state=results[spec_hash].state,
                    value=results[spec_hash].value,
                    step=results[spec_hash].step,
                    at_step=results[spec_hash].at_step,
                )
                for candidate, spec_hash in zip(proposed, hashes, strict=True)
            ]
        return tuple(rounds)

    def with_pins(
        self,
        *,
        base_model_revision: str | None = None,
        train_revision: str | None = None,
        eval_revision: str | None = None,
        revisions: Revisions | None = None,
        init_from: str | None = None,
        rendering: int | None = None,
    ) -> Experiment:
        """A copy with the given pins; None leaves a pin unchanged. `revisions` has those of data, in lists too."""
        given = {"base_model_revision": base_model_revision, "init_from": init_from}
        pins = {key: value for key, value in given.items() if value is not None}
        settled: dict[str, str | int | None] = {
            "train_revision": train_revision,
            "eval_revision": eval_revision,
            "rendering": rendering,
        }
        data = {key: value for key, value in settled.items() if value is not None}

        def pinned(dataset: DatasetSpec) -> DatasetSpec:
            return dataset.model_copy(update=data).with_revisions(revisions or {})

        return replace(
            self,
            spec=self.spec.model_copy(update={**pins, "dataset": pinned(self.spec.dataset)}),
            labelled_arms=tuple(
                (label, arm.model_copy(update={**pins, "dataset": pinned(arm.dataset)}))
                for label, arm in self.labelled_arms
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for another process of the same release."""
        return {
            "spec": self.spec.model_dump_json(by_alias=True),
            "arms": [[label, arm.to_json()] for label, arm in self.labelled_arms],
            "expressions": dict(self.expressions),
            "elsewhere": self.elsewhere,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Experiment:
        """The inverse of `to_json`. Checks types only: the data was checked before."""
        return cls(
            spec=ExperimentSpec.model_validate_json(data["spec"]),
            labelled_arms=tuple((label, ArmSpec.from_json(arm)) for label, arm in data["arms"]),
            expressions=data["expressions"],
            elsewhere=data["elsewhere"],
        )


def _labelled(candidate: ArmCandidate) -> Labelled:
    assert (
        candidate.arm is not None
    )  # Only the first round may have candidates without an arm, and it has been checked.
    return candidate.point.label, candidate.arm


_PATHS: tuple[KeyPath, ...] = (
    ("base_model",),
    ("base_model_config",),
    ("dataset", "train"),
    ("dataset", "eval"),
    ("dataset", "chat_template"),
)


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check an experiment file.

    Paths in the file are relative to its directory, paths in an override to the working directory. The result has
    absolute paths, so that workers in other directories find the same files. `overrides` are `key.path=value` texts,
    whose values are read as YAML.

    Raises:
        ConfigError: Lists all problems, one per line: `FILE:LINE: key.path: problem`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES:,} bytes, so it is not an experiment file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: file not found") from error
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
    recorded: bool = False,
) -> Experiment:
    """Check the text of an experiment file, like `load_experiment`.

    `filename` appears in messages. Paths are relative to `directory`, by default the working directory; `elsewhere` is
    as in `Experiment`. `recorded`: the text is one that a submission stored, with every pin; if it has no version of
    rendering, there was only the first.

    Raises:
        ConfigError: Lists all problems, one per line.
    """
    document, problems = read_document(text, filename)
    if problems and not document.data:
        raise document.error(problems)
    document.elsewhere = elsewhere
    if recorded and isinstance(data := document.data.get("dataset"), dict):
        data.setdefault("rendering", 1)
    problems.extend(_override(document, overrides))
    problems.extend(secrets_in(document))
    _make_paths_absolute(document, directory or Path.cwd())
    checked = check(document)
    problems.extend(checked.problems)
    if problems or checked.spec is None:
        raise document.error(problems)
    return Experiment(
        spec=checked.spec,
        labelled_arms=tuple(zip(checked.labels, checked.arms, strict=True)),
        expressions=checked.expressions,
        elsewhere=elsewhere,
    )


def _override(document: Document, overrides: Sequence[str]) -> list[Problem]:
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
    """Split `training.max_steps` at its dots; what follows `sweep.parameters.` is a single key."""
    axis = key.removeprefix("sweep.parameters.")
    if axis != key:
        return ("sweep", "parameters", axis)
    return as_path(key) if key else ()


def _set(document: Document, path: KeyPath, value: Any) -> None:
    reached, section = follow(document.data, path[:-1])
    if any(isinstance(part, int) for part in path[reached:]):
        raise ValueError(f"cannot be set: there is no {dotted(path[:-1])}")
    if section is not None and not isinstance(section, dict):
        raise ValueError(f"cannot be set: {dotted(path[:reached])} is {show(section)}, not a mapping")
    for depth in range(reached if section is None else reached + 1, len(path)):
        document.lines.setdefault(path[:depth], None)
    put(document.data, path, value)


def _make_paths_absolute(document: Document, directory: Path) -> None:
    for path in [*_PATHS, *_places_of_sources(document.data)]:
        reached, text = follow(document.data, path)
        if reached < len(path) or not isinstance(text, str) or not text:
            continue
        home = Path.cwd() if document.line(path) is None else directory
        if path[-1] == "chat_template" and text in BUILT_IN_TEMPLATES:
            continue
        if path[-1] in {"base_model_config", "chat_template"} or _is_path(text, home):
            text = os.path.abspath(home / os.path.expanduser(text))
            put(document.data, path, text)
        if path[-1] == "chat_template" and os.path.isfile(text):
            # The spec hash covers the template's content. A rule reports an unreadable file.
            with suppress(OSError):
                document.data["dataset"].setdefault("chat_template_revision", file_pin(text))


def _places_of_sources(data: Any) -> list[KeyPath]:
    """The key paths of sources in lists, and of those in a sweep."""
    places: list[KeyPath] = []

    def of_value(path: KeyPath) -> None:
        value = follow(data, path)[1]
        if isinstance(value, list):
            places.extend((*path, place, "source") for place in range(len(value)))
        else:
            places.append(path)

    def of_axes(path: KeyPath, *, values: bool) -> None:
        axes = follow(data, path)[1]
        for name in axes if isinstance(axes, dict) else ():
            if not isinstance(name, str) or not (name == "dataset.train" or is_source(name)):
                continue
            listed = axes[name]
            if not values:
                of_value((*path, name))
            elif isinstance(listed, list):
                for place in range(len(listed)):
                    of_value((*path, name, place))
            elif isinstance(listed, dict) and isinstance(listed.get("choice"), list):
                for place in range(len(listed["choice"])):
                    of_value((*path, name, "choice", place))

    for side in ("train", "eval"):
        if isinstance(follow(data, ("dataset", side))[1], list):
            of_value(("dataset", side))
    of_axes(("sweep", "parameters"), values=True)
    arms = follow(data, ("sweep", "arms"))
    if arms[0] == 2 and isinstance(arms[1], list):
        for place in range(len(arms[1])):
            of_axes(("sweep", "arms", place), values=False)
    return places


def _is_path(text: str, home: Path) -> bool:
    if text.startswith("pypi:"):
        return False
    try:
        local = isinstance(parse_source(text), LocalSource)
    except ValueError:
        local = False
    return local or os.path.exists(home / text)
