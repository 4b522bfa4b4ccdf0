"""One rendering of a value as text, for every entry point: training, evaluation, prediction, pyfunc, Python API.

| value | text |
|---|---|
| text | as it is |
| true, false | `true`, `false` |
| whole number | decimal digits |
| other number | the shortest digits that give the number again, as Python's `json` writes it: `1.0`, `0.1`, `1e+20` |
| the same in 16 or 32 bits | the shortest digits that give it again in these bits |
| date | `2024-01-07` |
| time stamp | ISO 8601, with what it has: `2024-01-07T09:30:00`, `2024-01-07T09:30:00.250000+01:00` |
| time of day, duration | `09:30:00`, `1 day, 2:00:00` |
| decimal number | as it is stored: `1.50` |
| UUID | lower case, with hyphens |
| null, NaN, NaT | missing |
| anything else (list, mapping, bytes) | refused |

A cell of a text file is a text, so its rendering is what is written there; a number of a JSON file is what Python's
`json` makes of it. Numbers in their canonical spelling are therefore the same in all kinds of files; others (`1.50`,
`01067`, `1e3`) are kept in text files and lost where a file stores numbers.

A format specification of a field decides what it is applied to:

| specification | applied to |
|---|---|
| a number (`05d`, `.2f`, `,`, `+`, `.1%`) | the number; a text is parsed |
| a date (`%d.%m.%Y`) | the date or time stamp; a text is parsed as ISO 8601 |
| anything else (`>10`, `.20s`) | the rendered text |
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.experiment.schema import RENDERING, DatasetSpec

_SPEC = re.compile(
    r"(?:.?(?P<align>[<>=^]))?(?P<sign>[-+ ])?(?P<zero>z)?(?P<alternate>\#)?(?P<fill>0)?(?P<width>[0-9]+)?"
    r"(?P<grouping>[,_])?(?P<precision>\.[0-9]+)?(?P<type>[bcdoxXneEfFgGs%])?",
    re.DOTALL,
)
_DATE_SPEC = re.compile(r"%[A-Za-z]")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE_TYPES = frozenset("bcdoxX")


class ValueProblem(ValueError):
    """A value has no text, or does not fit its format specification; completes "column x ..."."""


@dataclass(frozen=True, kw_only=True)
class Values:
    """How values become text.

    Attributes:
        version: 1 renders as releases up to 0.2: what Python's `format` makes of a value.
        na_values: Texts that stand for a missing value.
    """

    version: int = RENDERING
    na_values: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: DatasetSpec) -> Values:
        """The values of a definition."""
        return cls(version=dataset.rendering or RENDERING, na_values=dataset.na_values)

    def is_missing(self, value: object) -> bool:
        """Whether a value is null, NaN or NaT, or its text is one of `na_values`."""
        if is_null(value):
            return True
        if not self.na_values or self.version == 1:
            return False
        try:
            return text_of(value) in self.na_values
        except ValueProblem:
            return False

    def text(self, value: object, spec: str = "") -> str:
        """The text of a value, by a format specification.

        Raises:
            ValueProblem: The value has no text, is missing, or does not fit the specification.
        """
        if self.version == 1:
            try:
                return format(value, spec)
            except (ValueError, TypeError) as error:
                raise ValueProblem(f"is {value!r} ({type(value).__name__}): {error}") from error
        if self.is_missing(value):
            raise ValueProblem("has no value")
        return formatted(value, spec) if spec else text_of(value)


CURRENT = Values()


def is_null(value: object) -> bool:
    """Whether a value is null, NaN, or pandas' NaT or NA."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if value is None:
        return True
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    if isinstance(value, decimal.Decimal):
        return value.is_nan()
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    # Without an import of pandas, which takes a second.
    return type(value).__name__ in {"NaTType", "NAType"}


def text_of(value: object) -> str:
    """The text of a value that is there; see the table of this module.

    Raises:
        ValueProblem: It is of a kind that has no text.
    """
    value = plain_value(value)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        try:
            return int.__repr__(value)
        except ValueError as error:  # Python limits the digits of a whole number.
            raise ValueProblem(f"is a number that is too long: {error}") from error
    if isinstance(value, float):
        return json.dumps(float(value))
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID | datetime.timedelta):
        return str(value)
    kind = {"dict": "a mapping", "list": "a list", "tuple": "a list", "ndarray": "a list", "bytes": "bytes"}
    name = type(value).__name__
    raise ValueProblem(f"holds {kind.get(name, name)}, of which a template makes no text")


def plain_value(value: object) -> Any:
    """A scalar of numpy or pandas as Python's own type; anything else as it is.

    A number of 16 or 32 bits becomes the number with its shortest digits: 0.1, not 0.10000000149011612.
    """
    if isinstance(value, np.float16 | np.float32):
        return float(str(value))
    if isinstance(value, np.datetime64):
        if np.datetime_data(value.dtype)[0] in {"Y", "M", "W", "D"}:
            return value.astype("datetime64[D]").item()
        from pandas import Timestamp

        return Timestamp(value)
    if isinstance(value, np.timedelta64):
        from pandas import Timedelta

        return Timedelta(value).to_pytimedelta()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return plain_value(value[()])
    if isinstance(value, datetime.timedelta) and hasattr(value, "to_pytimedelta"):
        return value.to_pytimedelta()
    return value


def formatted(value: object, spec: str) -> str:
    """A value by a format specification; see the second table of this module.

    Raises:
        ValueProblem: It does not fit.
    """
    value = plain_value(value)
    kind = kind_of(spec)
    try:
        if kind == "date":
            return format(_date(value), spec)
        if kind == "text":
            return format(text_of(value), spec)
        return format(_number(value, whole=spec[-1] in _WHOLE_TYPES), spec)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, ValueProblem):
            raise
        raise ValueProblem(f"is {value!r}: {error}") from error


def kind_of(spec: str) -> str:
    """What a format specification is for: `number`, `date` or `text`.

    Raises:
        ValueProblem: It is none, or could be for a number or for a text.
    """
    if _DATE_SPEC.search(spec):
        return "date"
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueProblem("is not a format specification")
    if match["type"] == "s":
        return "text"
    if match["type"] or match["sign"] or match["zero"] or match["alternate"] or match["fill"] or match["grouping"]:
        return "number"
    if match["align"] == "=":
        return "number"
    if match["precision"]:
        raise ValueProblem(
            f"does not say what its precision is for: write {spec}g for digits of a number, {spec}f for decimals, or "
            f"{spec}s for letters of a text"
        )
    return "text"


def _number(value: object, *, whole: bool) -> int | float:
    if isinstance(value, decimal.Decimal):
        value = str(value)
    if isinstance(value, str):
        stripped = value.strip()
        if _WHOLE.fullmatch(stripped):
            value = int(stripped)
        elif _NUMBER.fullmatch(stripped):
            value = float(stripped)
        else:
            raise ValueProblem(f"is {value!r:.80}, which is not a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueProblem(f"is {text_of(value)!r:.80}, which is not a number")
    if not whole:
        return value
    if isinstance(value, float) and not value.is_integer():
        raise ValueProblem(f"is {value!r}, which is not a whole number")
    return int(value)


def _date(value: object) -> datetime.date | datetime.time:
    if isinstance(value, str):
        try:
            stamp = datetime.datetime.fromisoformat(value.strip())
        except ValueError as error:
            raise ValueProblem(f"is {value!r:.80}, which is not a date in ISO 8601") from error
        return stamp
    if not isinstance(value, datetime.date | datetime.time):
        raise ValueProblem(f"is {text_of(value)!r:.80}, which is not a date")
    return value
