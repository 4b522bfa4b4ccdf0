"""Expressions in a definition: which fields they name, and their values.

A name is a field's full path (`training.max_steps`), or its last part where that says which one is meant: a field of
the same section (`r` in `lora`), a field at the top (`seed`), or the only field of that name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.experiment.document import KeyPath, Problem, scalar
from rankwise.experiment.expressions import Expression, ExpressionError
from rankwise.experiment.fields import allowed, did_you_mean, get, leaves, numbers, show


class Unresolved(Exception):
    """A field that an expression needs is wrong itself; that is reported where it is wrong."""


class _Circle(ExpressionError):
    """Expressions that need each other."""

    def __init__(self, members: list[str]) -> None:
        super().__init__(f"it depends on itself: {' -> '.join([*members, members[0]])}")
        self.members = members


@dataclass(kw_only=True)
class Resolution:
    """Data with numbers in place of expressions, and what could not be resolved."""

    data: dict[str, Any]
    expressions: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    """Fields whose expression has a problem, or needs a field that has one."""
    needs: dict[str, set[str]] = field(default_factory=dict)
    """Fields that each expression needs, directly or through other expressions."""


def resolve(data: Mapping[str, Any]) -> Resolution:
    """Evaluate every expression that stands where a number is expected."""
    resolver = _Resolver(data)
    result = Resolution(data=copy.deepcopy(dict(data)))
    for path, text in resolver.texts.items():
        key = tuple(path.split("."))
        try:
            value = resolver.value(path)
        except ExpressionError as error:
            result.problems.append(
                Problem(path=key, text=f"must be {allowed(key)}, or an expression, got {show(text)}: {error}")
            )
            result.skipped.add(path)
        except Unresolved:
            result.skipped.add(path)
        else:
            result.expressions[path] = text
            result.needs[path] = resolver.needs[path]
            section = result.data
            for part in key[:-1]:
                section = section[part]
            section[key[-1]] = value
    return result


def evaluate_condition(condition: Expression, data: Mapping[str, Any]) -> bool:
    """Whether resolved data meets a condition.

    Raises:
        ExpressionError: A name is no field, or the result is neither true nor false.
        Unresolved: A field that it names is not there or wrong.
    """
    values = {}
    for name in condition.names:
        path = find_field(name, "")
        value = _lookup(data, path)
        # A list of modules is compared as a whole, in any order.
        values[name] = sorted(value) if isinstance(value, (list, tuple)) else value
    result = condition.evaluate(values)
    if not isinstance(result, bool):
        raise ExpressionError(f"must be true or false, gives {show(result)}")
    return result


def find_field(name: str, section: str) -> str:
    """The dotted path of the field that a name in an expression means.

    Raises:
        ExpressionError: There is none, or more than one.
    """
    known = leaves()
    if section and f"{section}.{name}" in known:
        return f"{section}.{name}"
    if name in known:
        return name
    homes = [path for path in known if path.endswith(f".{name}")]
    if len(homes) == 1:
        return homes[0]
    if homes:
        raise ExpressionError(f"the name {name!r} can mean {', '.join(homes)}: write the full path")
    last_parts = {path.rpartition(".")[2] for path in known}
    candidates = known if "." in name else last_parts
    raise ExpressionError(f"there is no field {name!r}{did_you_mean(name, candidates)}")


def _lookup(data: Mapping[str, Any], path: str) -> Any:
    try:
        value = get(data, tuple(path.split(".")))
    except KeyError as error:
        raise Unresolved from error
    if value is None:
        raise ExpressionError(f"{path} is null here")
    return value


class _Resolver:
    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.values: dict[str, Any] = {}
        self.stack: list[str] = []
        self.needs: dict[str, set[str]] = {}
        self.texts = {path: text for path in numbers() if isinstance(text := _peek(data, path), str)}

    def value(self, path: str) -> Any:
        if path not in self.texts:
            value = _lookup(self.data, path)
            if path in numbers() and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise Unresolved
            return value
        if path not in self.values:
            if path in self.stack:
                raise _Circle(self.stack[self.stack.index(path) :])
            self.stack.append(path)
            try:
                self.values[path] = self._evaluate(path)
            finally:
                self.stack.pop()
        return self.values[path]

    def _evaluate(self, path: str) -> Any:
        text = self.texts[path]
        if isinstance(scalar(text), (int, float)):
            raise ExpressionError("a number is written without quotes")
        expression = Expression.parse(text)
        section = path.rpartition(".")[0]
        self.needs[path] = set()
        result = expression.evaluate({name: self._operand(name, section) for name in expression.names})
        if isinstance(result, float) and result.is_integer() and numbers()[path] == "integer":
            return int(result)
        return result

    def _operand(self, name: str, section: str) -> Any:
        path = find_field(name, section)
        try:
            value = self.value(path)
        except _Circle as error:
            # Each member of a circle reports it; what only needs a member does not.
            if self.stack[-1] in error.members:
                raise
            raise Unresolved from None
        except ExpressionError:
            # The other expression's problem is reported at its own place.
            if path in self.texts:
                raise Unresolved from None
            raise
        self.needs[self.stack[-1]] |= {path, *self.needs.get(path, ())}
        return value


def _peek(data: Mapping[str, Any], path: str) -> Any:
    value: Any = data
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def as_path(path: str) -> KeyPath:
    """A field's dotted path as a key path."""
    return tuple(path.split("."))
