"""Templates over a row's columns, such as `carat {carat}, price {price:.0f}`.

A field is the plain name of a column with an optional format specification. Attribute access (`{a.b}`), indexing
(`{a[0]}`), conversions (`{a!r}`) and positions (`{}`) are never evaluated: a definition may come from someone else,
and a text template must not become a way to reach into objects.
"""

from __future__ import annotations

import difflib
import math
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.exceptions import DatasetError

MAX_WIDTH = 999
# A width of ten digits would take the machine's memory with the first row.
_WIDE = re.compile(r"[0-9]{4,}")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One `{column:spec}` of a template."""

    column: str
    spec: str


@dataclass(frozen=True, kw_only=True)
class RowTemplate:
    """A parsed template. `key` is the YAML key it came from, for messages; `parts` are literal texts and fields."""

    key: str
    parts: tuple[str | Field, ...]

    @classmethod
    def parse(cls, text: str, key: str) -> RowTemplate:
        """Parse `text`, the value of the YAML key `key`.

        Raises:
            DatasetError: A brace is unbalanced, or a field is anything but a column name and a format specification.
        """
        parts: list[str | Field] = []
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DatasetError(
                f"{key}: {text!r} is not a template: {error}; write {{{{ and }}}} for literal braces"
            ) from error
        for literal, name, spec, conversion in parsed:
            if literal:
                parts.append(literal)
            if name is None:
                continue
            if not name or name.isdigit():
                raise DatasetError(
                    f"{key}: field {{{name}}} has no column name; allowed are names of columns, such as {{price}} or "
                    f"{{price:.0f}}; write {{{{ and }}}} for literal braces"
                )
            if _WIDE.search(spec or ""):
                raise DatasetError(
                    f"{key}: field {{{name}:{spec}}} asks for more than {MAX_WIDTH} characters or digits; allowed are "
                    f"widths and precisions up to {MAX_WIDTH}"
                )
            if conversion or "{" in (spec or ""):
                shown = f"!{conversion}" if conversion else f":{spec}"
                raise DatasetError(
                    f"{key}: field {{{name}{shown}}} is not allowed; allowed are names of columns with a plain format "
                    "specification, such as {price} or {price:.0f}"
                )
            parts.append(Field(column=name, spec=spec or ""))
        return cls(key=key, parts=tuple(parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template uses, each once, in order."""
        return tuple(dict.fromkeys(part.column for part in self.parts if isinstance(part, Field)))

    def check(self, available: Iterable[str]) -> None:
        """Check that every column exists.

        Raises:
            DatasetError: A column does not exist; the message lists those that do and the nearest name.
        """
        for column in self.columns:
            check_column(column, available, self.key)

    def render(self, row: Mapping[str, Any], row_id: str) -> str:
        """Fill the template from one row. `row_id` names the row in a message.

        Raises:
            DatasetError: A format specification does not fit the value.
        """
        out = []
        for part in self.parts:
            if isinstance(part, str):
                out.append(part)
                continue
            value = row[part.column]
            try:
                out.append(format(value, part.spec))
            except (ValueError, TypeError) as error:
                raise DatasetError(
                    f"{self.key}: field {{{part.column}:{part.spec}}} does not fit row {row_id}, where {part.column} "
                    f"is {value!r} ({type(value).__name__}): {error}"
                ) from error
        return "".join(out)


def check_column(column: str, available: Iterable[str], key: str) -> None:
    """Check that `column`, which the YAML key `key` names, is one of `available`.

    Raises:
        DatasetError: It is not.
    """
    names = list(available)
    if column in names:
        return
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    by_case = [name for name in names if name.lower() == column.lower()]
    base = column.replace("[", ".").split(".")[0]
    if base != column and base in names:
        hint = f"; attributes and indices of {base!r} cannot be used, only whole columns."
    elif by_case or near:
        hint = f"; did you mean {(by_case or near)[0]!r}?"
    else:
        hint = "."
    raise DatasetError(f"{key}: unknown column {column!r}{hint} Available columns: {', '.join(names) or 'none'}")


def is_missing(value: object) -> bool:
    """Whether a cell is empty: null, or the NaN that stands for it in a column of floats."""
    return value is None or (isinstance(value, float) and math.isnan(value))
