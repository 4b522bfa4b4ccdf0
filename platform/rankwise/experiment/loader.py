"""Experiment files: read, overridden, checked. All problems are reported at once, each with file, line and key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rankwise.exceptions import ConfigError
from rankwise.experiment.checker import check
from rankwise.experiment.document import MAX_BYTES, Document, KeyPath, Problem, dotted, read_document, read_value
from rankwise.experiment.fields import show
from rankwise.experiment.rules import BUILT_IN_TEMPLATES, file_pin
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.secrets import secrets_in
from rankwise.experiment.source import LocalSource, parse_source

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
