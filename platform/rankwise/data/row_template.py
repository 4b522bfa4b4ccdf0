"""Texts made of a row's columns.

A template's field is a plain column name with an optional format specification (`{price:.0f}`). Attribute access
(`{a.b}`), indexing (`{a[0]}`), conversions (`{a!r}`) and positions (`{}`) are never evaluated: a definition may come
from someone else, and a text template must not become a way to reach into objects.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.data.values import CURRENT, ValueProblem, Values, kind_of
from rankwise.exceptions import DatasetError

MAX_WIDTH = 999
# A width of ten digits would exhaust the memory with the first row.
_WIDE = re.compile(r"[0-9]{4,}")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One `{column:spec}` of a template."""

    column: str
    spec: str


@dataclass(frozen=True, kw_only=True)
class Optional:
    """A part `[[...]]`, which is left out of a row where one of its columns is empty."""

    parts: tuple[str | Field, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it uses."""
        return tuple(part.column for part in self.parts if isinstance(part, Field))


_BRACKETS = re.compile(r"\[\[\[\[|\]\]\]\]|\[\[|\]\]")


@dataclass(frozen=True, kw_only=True)
class RowTemplate:
    """A parsed template.

    Attributes:
        key: The YAML key it came from, for messages.
        parts: Literal texts, fields and optional parts.
        values: How values become text.
        source: What it was parsed from.
    """

    key: str
    parts: tuple[str | Field | Optional, ...]
    values: Values = CURRENT
    source: str = ""

    @classmethod
    def parse(cls, text: str, key: str, values: Values = CURRENT) -> RowTemplate:
        """Parse `text`, the value of the YAML key `key`.

        A part in double brackets is left out where one of its columns is empty: `{question}[[ Context: {context}]]`.
        Double brackets without a column between them are plain text; four stand for two.

        Args:
            text: The template.
            key: Names it in messages.
            values: How values become text. Version 1 reads double brackets as text.

        Raises:
            DatasetError: A brace is unbalanced, or a field is anything but a column name and a format specification.
        """
        if values.version == 1:
            return cls(key=key, parts=_fields(text, key, text, values), values=values, source=text)
        parts: list[str | Field | Optional] = []
        outside, inside = "", None
        place = 0
        for match in [*_BRACKETS.finditer(text), None]:
            literal = text[place : len(text) if match is None else match.start()]
            place = len(text) if match is None else match.end()
            mark = "" if match is None else match[0]
            if len(mark) == 4:
                literal, mark = literal + mark[:2], ""
            if inside is None:
                outside += literal
                if mark == "[[":
                    inside = ""
                else:
                    outside += mark
                continue
            inside += literal
            if mark == "[[":
                raise DatasetError(
                    f"{key}: {text!r} has an optional part inside another one; write [[ ]] side by side, or [[[[ for "
                    "two literal brackets"
                )
            if mark == "]]" or match is None:
                found = _fields(inside, key, text, values)
                if mark and any(isinstance(part, Field) for part in found):
                    parts += _fields(outside, key, text, values)
                    parts.append(Optional(parts=found))
                    outside = ""
                else:
                    outside += f"[[{inside}{mark}"
                inside = None
        return cls(key=key, parts=(*parts, *_fields(outside, key, text, values)), values=values, source=text)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template uses, each once, in order."""
        return tuple(
            dict.fromkeys(
                column
                for part in self.parts
                if not isinstance(part, str)
                for column in (part.columns if isinstance(part, Optional) else (part.column,))
            )
        )

    @property
    def required(self) -> tuple[str, ...]:
        """The columns outside the optional parts."""
        return tuple(dict.fromkeys(part.column for part in self.parts if isinstance(part, Field)))

    @property
    def whole_column(self) -> str | None:
        """The column of a template that is nothing but that column, such as `{prompt}`."""
        (part, *others) = self.parts or ("",)
        return part.column if isinstance(part, Field) and not part.spec and not others else None

    def missing(self, row: Mapping[str, Any]) -> str | None:
        """The first column outside the optional parts that has no value in a row, if any."""
        fields = (part.column for part in self.parts if isinstance(part, Field))
        return next((column for column in fields if self.values.is_missing(row.get(column))), None)

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
            DatasetError: A value has no text, or does not fit its format specification.
        """
        out = []
        for part in self.parts:
            if not isinstance(part, Optional):
                out.append(self._rendered(part, row, row_id))
            elif not any(self.values.is_missing(row.get(column)) or row[column] == "" for column in part.columns):
                out += [self._rendered(inner, row, row_id) for inner in part.parts]
        return "".join(out)

    def _rendered(self, part: str | Field, row: Mapping[str, Any], row_id: str) -> str:
        if isinstance(part, str):
            return part
        try:
            # A row of a JSON file need not have every column.
            return self.values.text(row.get(part.column), part.spec)
        except ValueProblem as problem:
            shown = f"{part.column}:{part.spec}" if part.spec else part.column
            advice = "; for a chat, set dataset.messages or dataset.format" if "makes no text" in str(problem) else ""
            raise DatasetError(
                f"{self.key}: field {{{shown}}} does not fit row {row_id}: column {part.column!r} {problem}{advice}"
            ) from problem


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


def _fields(text: str, key: str, whole: str, values: Values) -> tuple[str | Field, ...]:
    parts: list[str | Field] = []
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DatasetError(
            f"{key}: {whole!r} is not a template: {error}; write {{{{ and }}}} for literal braces"
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
                f"{key}: field {{{name}:{spec}}} has a width or precision above {MAX_WIDTH}; allowed are widths "
                f"and precisions up to {MAX_WIDTH}"
            )
        if conversion or "{" in (spec or ""):
            shown = f"!{conversion}" if conversion else f":{spec}"
            raise DatasetError(
                f"{key}: field {{{name}{shown}}} is not allowed; allowed are names of columns with a plain format "
                "specification, such as {price} or {price:.0f}"
            )
        if spec and values.version > 1:
            try:
                kind_of(spec)
            except ValueProblem as problem:
                raise DatasetError(f"{key}: field {{{name}:{spec}}}: {spec!r} {problem}") from problem
        parts.append(Field(column=name, spec=spec or ""))
    return tuple(parts)
