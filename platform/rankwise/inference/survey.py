"""A first look at an input: how many rows, which columns of which types, which models its rows name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rankwise.assets.progress import Progress
from rankwise.inference.tables import read_rows, table_format

Number = Literal["int", "float"]
_PER_STEP = 1000
_LONGEST_NUMBER = 300
_READ: Mapping[str, type[int] | type[float]] = {"int": int, "float": float}
# Not those with zeros in front: they are names, such as postcodes.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What an input has.

    Attributes:
        rows: How many rows, unreadable ones too.
        columns: Names of all columns, in the order in which they come up, each with the names of its values' types.
        models: How many rows name each model.
        unnamed: How many readable rows name none.
        numbers: Columns of texts (those of CSV all are) in which every text is a number: "int" or "float". A template
            gets them as numbers, as `datasets` gives them in training, so that `{carat:.2f}` means the same.
    """

    rows: int
    columns: Mapping[str, frozenset[str]]
    models: Mapping[str, int]
    unnamed: int
    numbers: Mapping[str, Number]

    def to_json(self) -> dict[str, Any]:
        """As plain values: an input is looked through once, however often work on it is cut off."""
        return {
            "rows": self.rows,
            "columns": {name: sorted(kinds) for name, kinds in self.columns.items()},
            "models": dict(self.models),
            "unnamed": self.unnamed,
            "numbers": dict(self.numbers),
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**values, "columns": {name: frozenset(kinds) for name, kinds in values["columns"].items()}})

    def typed(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row with its numbers as numbers."""
        if not self.numbers:
            return columns
        return {
            name: _READ[self.numbers[name]](value) if name in self.numbers and value != "" else value
            for name, value in columns.items()
        }


def survey(
    path: Path, model_column: str, progress: Progress, check: Callable[[Mapping[str, Any]], object] | None = None
) -> Survey:
    """Read an input once.

    Args:
        path: The input.
        model_column: The column in which a row may name its model.
        progress: Told of rows.
        check: Given the columns of each row, to refuse what could not be written at the end.

    Raises:
        ConfigError: The format is not known.
        AssetError: The file is missing or cannot be read.
    """
    kinds: dict[str, set[str]] = {}
    numbers: dict[str, Number | None] = {}
    texts = table_format(path) == ".csv"
    models: Counter[str] = Counter()
    rows = unnamed = 0
    with progress.task(f"looking through {path.name}", None, "rows") as advance:
        for row in read_rows(path):
            rows += 1
            if rows % _PER_STEP == 0:
                advance(_PER_STEP)
            for name, value in row.columns.items():
                seen = kinds.setdefault(name, set())
                if value is not None:
                    seen.add(type(value).__name__)
                if texts and value != "":
                    numbers[name] = _wider(numbers.get(name, "int"), value)
            if row.error is None:
                if check is not None:
                    check(row.columns)
                named = named_model(row.columns, model_column)
                if named is None:
                    unnamed += 1
                else:
                    models[named] += 1
    return Survey(
        rows=rows,
        columns={name: frozenset(seen) for name, seen in kinds.items()},
        models=dict(models),
        unnamed=unnamed,
        numbers={name: kind for name, kind in numbers.items() if kind is not None},
    )


def _wider(kind: Number | None, text: str) -> Number | None:
    """The kind of number that holds this text too; None where there is none."""
    # Of a longer one Python makes no number.
    if len(text) > _LONGEST_NUMBER:
        return None
    if kind == "int" and _INTEGER.fullmatch(text):
        return "int"
    return "float" if kind is not None and _NUMBER.fullmatch(text) else None


def named_model(columns: Mapping[str, Any], model_column: str) -> str | None:
    """The model that a row names; None where it names none."""
    value = columns.get(model_column)
    return None if value is None or value == "" else str(value)
