"""An experiment: a checked definition and its arms, made once from a file or a text and passed along.

Every command, and every process that works for it, asks this one object. It crosses to another process as plain data,
and is built again there without being checked again.
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
from rankwise.experiment.fields import show
from rankwise.experiment.paths import KeyPath, as_path, dotted, follow, put
from rankwise.experiment.points import Candidate, Candidates, Points, overlay
from rankwise.experiment.rules import BUILT_IN_TEMPLATES, file_pin
from rankwise.experiment.schema import ExperimentSpec, greater_is_better, plain
from rankwise.experiment.search import Told, TrialState
from rankwise.experiment.source import LocalSource, parse_source

Labelled = tuple[str, ArmSpec]
"""What sets an arm apart (`lora.r=8, seed=0`; empty for the only arm of a definition without a sweep), and the arm."""


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


Results = Callable[[Sequence[ArmSpec]], Mapping[str, ArmResult]]
"""Given arms, what is known of them, by spec hash; an arm that has not ended is left out."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A checked definition and its arms. `load_experiment` and `parse_experiment` make it.

    Attributes:
        spec: The definition, with numbers in place of expressions.
        labelled_arms: Its arms in the order of its grid or list, each with what sets it apart. Of a search in rounds,
            those of the first round: the others depend on results (see `rounds`).
        expressions: Field paths that the definition gives as an expression, with its text: {"lora.lora_alpha": "2*r"}.
        elsewhere: Whether it was written down on another machine, so that base and rows need not be on this one.
    """

    spec: ExperimentSpec
    labelled_arms: tuple[Labelled, ...]
    expressions: Mapping[str, str] = field(default_factory=dict)
    elsewhere: bool = False

    @property
    def arms(self) -> tuple[ArmSpec, ...]:
        """The arms alone."""
        return tuple(arm for _, arm in self.labelled_arms)

    @property
    def is_search(self) -> bool:
        """Whether arms depend on results, so that they cannot all be known before the first has ended."""
        return self.spec.sweep.method == "tpe"

    @property
    def planned_rounds(self) -> tuple[int, ...]:
        """How many arms each round of a search is to have: one number for random, () where nothing is drawn."""
        space = self._points.space
        return () if space is None else space.rounds

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """The whole definition as plain data, defaults included, expressions as their text."""
        data: dict[str, Any] = plain(self.spec.model_dump(mode="json", by_alias=True))
        return overlay(data, dict(self.expressions))

    @cached_property
    def text(self) -> str:
        """The whole definition as an experiment file, with which the same arms come out again."""
        return to_yaml(dict(self.document))

    @cached_property
    def _points(self) -> Points:
        return read_sweep(self.document)

    def require_known_arms(self) -> None:
        """Refuse a definition whose arms depend on results.

        Raises:
            ConfigError: It is such a one.
        """
        if self.is_search:
            raise ConfigError(
                f"sweep.method: tpe proposes the arms of {self.spec.name!r} round by round from results, so they "
                "cannot be submitted at once; `rankwise run FILE` drives the search (workers help it), or take "
                "method: random"
            )

    def rounds(self, results_of: Results) -> tuple[Round, ...]:
        """The rounds of a search as far as results go: those that have ended, and the next one.

        They follow from the definition and the results alone: whoever knows the same results gets the same rounds.

        Args:
            results_of: Asked for the arms of one round after the other. A round has ended when all of its arms have.
        """
        space = self._points.space
        assert space is not None, "not a search"
        candidates = Candidates(dict(self.document), self._points.where, elsewhere=self.elsewhere)
        greater = greater_is_better(self.spec.evaluation.primary_metric)
        rounds: list[Round] = []
        told: list[Told] = []
        taken: set[str] = set()
        for number in range(len(space.rounds)):
            asked, rejected = candidates.of_round(space, number, told, taken=taken, greater=greater)
            if not asked:
                break
            values = tuple(candidate.point.values for candidate in asked)
            rounds.append(Round(number=number, arms=tuple(map(_labelled, asked)), values=values, rejected=rejected))
            arms = [arm for _, arm in rounds[-1].arms]
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
        return tuple(rounds)

    def with_pins(
        self,
        *,
        base_model_revision: str | None = None,
        train_revision: str | None = None,
        eval_revision: str | None = None,
        init_from: str | None = None,
    ) -> Experiment:
        """The same experiment with pins filled in; what is None stays as it is. No pin differs between arms."""
        given = {"base_model_revision": base_model_revision, "init_from": init_from}
        pins = {key: value for key, value in given.items() if value is not None}
        given = {"train_revision": train_revision, "eval_revision": eval_revision}
        data = {key: value for key, value in given.items() if value is not None}
        return replace(
            self,
            spec=self.spec.model_copy(update={**pins, "dataset": self.spec.dataset.model_copy(update=data)}),
            labelled_arms=tuple(
                (label, arm.model_copy(update={**pins, "dataset": arm.dataset.model_copy(update=data)}))
                for label, arm in self.labelled_arms
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data, for another process of the same release."""
        return {
            "spec": self.spec.model_dump_json(by_alias=True),
            "arms": [[label, arm.to_json()] for label, arm in self.labelled_arms],
            "expressions": dict(self.expressions),
            "elsewhere": self.elsewhere,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Experiment:
        """Read what `to_json` gave. It was checked before, so only types are looked at."""
        return cls(
            spec=ExperimentSpec.model_validate_json(data["spec"]),
            labelled_arms=tuple((label, ArmSpec.from_json(arm)) for label, arm in data["arms"]),
            expressions=data["expressions"],
            elsewhere=data["elsewhere"],
        )


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


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
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
) -> Experiment:
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
    return Experiment(
        spec=checked.spec,
        labelled_arms=tuple(zip(checked.labels, checked.arms, strict=True)),
        expressions=checked.expressions,
        elsewhere=elsewhere,
    )


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
    return as_path(key) if key else ()


def _set(document: Document, path: KeyPath, value: Any) -> None:
    reached, section = follow(document.data, path[:-1])
    if section is not None and not isinstance(section, dict):
        raise ValueError(f"cannot be set: {dotted(path[:reached])} is {show(section)}, not a mapping")
    for depth in range(reached if section is None else reached + 1, len(path)):
        document.lines.setdefault(path[:depth], None)
    put(document.data, path, value)


def _make_paths_absolute(document: Document, directory: Path) -> None:
    for path in _PATHS:
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
            # The hash covers what the template says, so a changed file is another arm. A file that cannot be read is
            # reported with the other problems.
            with suppress(OSError):
                document.data["dataset"].setdefault("chat_template_revision", file_pin(text))


def _is_path(text: str, home: Path) -> bool:
    if text.startswith("pypi:"):
        return False
    try:
        local = isinstance(parse_source(text), LocalSource)
    except ValueError:
        local = False
    return local or os.path.exists(home / text)
