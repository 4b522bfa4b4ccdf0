"""Every field of resolved data by itself, and what is wrong with it in words."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rankwise.experiment.document import KeyPath, Problem, dotted
from rankwise.experiment.fields import allowed, did_you_mean, keys, node_at, options, show, unknown_key
from rankwise.experiment.resolve import Resolution, as_path
from rankwise.experiment.schema import ExperimentSpec

# Branches of the union dataset.eval, which pydantic puts into an error's place.
_TAGS = {"source", "split"}


def overlay(data: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of plain data with the values of some fields, by dotted path."""
    result = copy.deepcopy(data)
    for path, value in values.items():
        *parents, leaf = path.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = copy.deepcopy(value)
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
