"""Reads and writes experiment files: YAML 1.2 as plain data with the line of every key; refuses secrets.

The core schema of YAML 1.2 is applied here to ruamel.yaml's events: `2e-3` is a float; `on`, `no`, `yes` and `1_000`
are text. Duplicate keys, tags, several documents, and alias bombs are errors. Files of MLflow and vLLM and dataset
cards are YAML 1.1, read by `assets.guard.read_yaml`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError, YAMLStreamError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from rankwise.exceptions import ConfigError
from rankwise.experiment.paths import KeyPath, dotted
from rankwise.redact import contains_secret

MAX_BYTES = 2**20
MAX_DEPTH = 20
# A sweep with a list of 1,000 arms has about 10,000 nodes; an alias bomb exceeds this at its fifth level.
MAX_NODES = 100_000
OVERRIDE = "--set"

_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


def scalar(text: str) -> bool | int | float | str | None:
    """The value of a plain (unquoted) scalar in the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    # Python refuses to convert integers of more than 4,300 digits; nothing here needs more than 19.
    if len(text) <= 100:
        if _INT.fullmatch(text):
            return int(text)
        if _OCTAL.fullmatch(text):
            return int(text[2:], 8)
        if _HEX.fullmatch(text):
            return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return float(f"{infinite[1]}inf")
    return float("nan") if _NAN.fullmatch(text) else text


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem at a key; the text names the value and what is allowed."""

    path: KeyPath
    text: str
    line: int | None = None


@dataclass(kw_only=True)
class Document:
    """Plain data, and the line of every key and list item; None for overrides.

    `elsewhere`: it comes from another machine, so that its files need not exist on this one.
    """

    filename: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int | None] = field(default_factory=dict)
    elsewhere: bool = False

    def line(self, path: KeyPath) -> int | None:
        """Line of a key, or of the nearest key above it; None when an override set it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return 1

    def error(self, problems: Sequence[Problem]) -> ConfigError:
        """The error that reports these problems."""
        texts = self.report(problems)
        return ConfigError("\n".join(texts), texts)

    def report(self, problems: Sequence[Problem]) -> tuple[str, ...]:
        """The problems as lines of text, each once, in the order of the file."""

        def place(problem: Problem) -> tuple[bool, int]:
            line = problem.line or self.line(problem.path)
            return line is None, line or 0

        texts = []
        for problem in sorted(problems, key=place):
            line = problem.line or self.line(problem.path)
            where = OVERRIDE if line is None else f"{self.filename}:{line}"
            key = dotted(problem.path)
            texts.append(f"{where}: {key}: {problem.text}" if key else f"{where}: {problem.text}")
        return tuple(dict.fromkeys(texts))


def read_document(text: str, filename: str) -> tuple[Document, list[Problem]]:
    """Read a file's text. If there are problems, the document holds what could be read."""
    document = Document(filename=filename)
    if len(text.encode()) > MAX_BYTES:
        return document, [
            Problem(path=(), text=f"is larger than {MAX_BYTES:,} bytes, so it is not an experiment file", line=1)
        ]
    value, problems = _Reader(document.lines).read(text)
    if isinstance(value, dict):
        document.data = value
    elif not problems:
        problems = [Problem(path=(), text="must be a mapping with the keys of an experiment", line=1)]
    return document, problems


def read_value(text: str) -> Any:
    """Read the value of an override as it would be read from the file.

    Raises:
        ValueError: The text is not one YAML value.
    """
    value, problems = _Reader({}).read(text)
    if problems:
        raise ValueError(problems[0].text)
    return value


class _Stop(Exception):
    """Aborts reading."""


class _Reader:
    """Builds data from YAML events. An alias copies the anchored value, whose nodes count again."""

    def __init__(self, lines: dict[KeyPath, int | None]) -> None:
        self.lines = lines
        self.problems: list[Problem] = []
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.nodes = 0

    def read(self, text: str) -> tuple[Any, list[Problem]]:
        value: Any = None
        try:
            events: Iterator[Event] = iter(YAML(typ="safe", pure=True).parse(text))
            documents = 0
            for event in events:
                if isinstance(event, DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        self._stop((), event, "starts a second document; a file must hold one")
                    value = self._value(next(events), events, (), 0)
        except _Stop:
            pass
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = " ".join(str(part) for part in (error.context, error.problem) if part)
            self._add((), mark.line + 1 if mark else 1, f"is not YAML: {problem}")
        except (YAMLError, YAMLStreamError) as error:
            self._add((), 1, f"is not YAML: {' '.join(str(error).split())}")
        return value, self.problems

    def _add(self, path: KeyPath, line: int, text: str) -> None:
        self.problems.append(Problem(path=path, text=text, line=line))

    def _stop(self, path: KeyPath, event: Event, text: str) -> None:
        self._add(path, _line(event), text)
        raise _Stop

    def _count(self, nodes: int, path: KeyPath, event: Event) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            self._stop(path, event, f"expands to more than {MAX_NODES:,} values")

    def _value(self, event: Event, events: Iterator[Event], path: KeyPath, depth: int) -> Any:
        if depth > MAX_DEPTH:
            self._stop(path, event, f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                self._stop(path, event, f"the alias *{event.anchor} has no complete value before it")
            value, nodes = self.anchors[event.anchor]
            self._count(nodes, path, event)
            return _copy(value)
        self._count(1, path, event)
        before = self.nodes
        if isinstance(event, ScalarEvent):
            self._refuse_tag(event, path)
            value = scalar(event.value) if event.style is None else event.value
        elif isinstance(event, MappingStartEvent):
            self._refuse_tag(event, path)
            value = self._mapping(events, path, depth)
        else:
            assert isinstance(event, SequenceStartEvent)
            self._refuse_tag(event, path)
            value = self._sequence(events, path, depth)
        if event.anchor:
            self.anchors[event.anchor] = (value, 1 + self.nodes - before)
        return value

    def _mapping(self, events: Iterator[Event], path: KeyPath, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[str, int] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            key = self._value(event, events, path, depth + 1)
            line = _line(event)
            if not isinstance(key, str):
                self._add(path, line, f"a key must be text, got {key!r}")
                key = str(key)
            here = (*path, key)
            if key in first:
                self._add(here, line, f"is given twice, first on line {first[key]}; remove one")
                self._value(next(events), events, here, depth + 1)
                continue
            first[key] = line
            self.lines[here] = line
            values[key] = self._value(next(events), events, here, depth + 1)
        return values

    def _sequence(self, events: Iterator[Event], path: KeyPath, depth: int) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            here = (*path, len(values))
            self.lines[here] = _line(event)
            values.append(self._value(event, events, here, depth + 1))
        return values

    def _refuse_tag(self, event: Any, path: KeyPath) -> None:
        if event.tag is not None and not (isinstance(event, ScalarEvent) and event.tag == "!"):
            self._add(path, _line(event), f"has the tag {event.tag}; tags are not allowed")


def _line(event: Event) -> int:
    return int(event.start_mark.line) + 1


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


_BARE = re.compile(r"[A-Za-z_./~][\w ./*+@=%()-]*(?<! )")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


def to_yaml(data: dict[str, Any], depth: int = 0) -> str:
    """Write data as YAML that reads back as the same data.

    Non-empty mappings are in block style, everything inside lists in flow style. Text that needs quotes is written as
    JSON, which YAML 1.2 includes.
    """
    lines = []
    for key, value in data.items():
        head = f"{'  ' * depth}{_flow(key)}:"
        if isinstance(value, dict) and value:
            lines.append(f"{head}\n{to_yaml(value, depth + 1)}")
        else:
            lines.append(f"{head} {_flow(value)}\n")
    return "".join(lines)


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, str) and _BARE.fullmatch(value) and isinstance(scalar(value), str):
        return value
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # YAML treats these as line breaks or refuses them, and it does not have JSON's surrogate pairs.
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_ADVICE = (
    "looks like a secret (a token, a private key, or a URL with a password), and definitions are stored in the queue "
    "and in MLflow; remove it, and set it in the environment instead (HF_TOKEN, ~/.netrc, pip's configuration)"
)


def secrets_in(document: Document) -> list[Problem]:
    """A problem for each value that holds a secret; the message does not repeat the secret."""
    return [Problem(path=path, text=_ADVICE) for path, text in _texts(document.data, ()) if contains_secret(text)]


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, index))
