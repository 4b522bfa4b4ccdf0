"""Records in JSON files that rankwise wrote and reads back, which damage or another program may have changed since."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
_LONGEST = 80


class DamagedRecordError(ValueError):
    """Raised when a file does not hold the record that is expected there."""


def parse_record(content: bytes, kind: TypeAdapter[T]) -> T:
    """The record in the content of a file. Types are not converted, and nesting is limited.

    Raises:
        DamagedRecordError: It is not JSON, or not such a record; the message says where, in one line.
    """
    try:
        return kind.validate_json(content, strict=True)
    except ValidationError as error:
        raise DamagedRecordError(describe_problem(error)) from None


def describe_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, in one line: where, what, and which value."""
    problem: Any = error.errors(include_url=False)[0]
    place = ".".join(str(part)[:_LONGEST] for part in problem["loc"])
    value = repr(problem["input"][:200] if isinstance(problem["input"], str | bytes) else problem["input"])
    value = value if len(value) <= _LONGEST else value[:_LONGEST] + "..."
    return f"{place}: {problem['msg']}, got {value}" if place else f"{problem['msg']}, got {value}"
