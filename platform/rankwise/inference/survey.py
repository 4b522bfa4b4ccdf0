"""A first look at an input: how many rows, which columns of which types, which models its rows name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.progress import Progress
from rankwise.inference.tables import read_rows, table_format

_PER_STEP = 1000
# Not those with zeros in front: they are names, such as postcodes.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What an input has.

    Attributes:
        rows: How many rows, unreadable ones too.
        columns: Names of all columns, in the order in which they come up, each with the types of its values.
        models: How many rows name each model.
        unnamed: How many readable rows name none.
        numbers: Columns of texts (those of CSV all are) in which every text is a number: `int` or `float`. A template
            gets them as numbers, as `datasets` gives them in training, so that `{carat:.2f}` means the same.
    """

    rows: int
    columns: Mapping[str, frozenset[type]]
    models: Mapping[str, int]
    unnamed: int
    numbers: Mapping[str, type[int] | type[float]]

    def typed(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row with its numbers as numbers."""
        if not self.numbers:
            return columns
        return {
            name: self.numbers[name](value) if name in self.numbers and value != "" else value
            for name, value in columns.items()
        }

    def mixed(self) -> dict[str, list[str]]:
        """Columns with values of several types that no column of one type holds."""
        numbers = {int, float}
        return {
            name: sorted(kind.__name__ for kind in kinds)
            for name, kinds in self.columns.items()
            if len(kinds) > 1 and not kinds <= numbers
        }


def survey(path: Path, model_column: str, progress: Progress) -> Survey:
    """Read an input once.

    Raises:
        ConfigError: The format is not known.
        AssetError: The file is missing or cannot be read.
    """
    kinds: dict[str, set[type]] = {}
    numbers: dict[str, type[int] | type[float] | None] = {}
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
                    seen.add(type(value))
                if texts and value != "":
                    numbers[name] = _wider(numbers.get(name, int), value)
            if row.error is None:
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


def _wider(kind: type[int] | type[float] | None, text: str) -> type[int] | type[float] | None:
    """The kind of number that holds this text too; None where there is none."""
    if kind is int and _INTEGER.fullmatch(text):
        return int
    return float if kind is not None and _NUMBER.fullmatch(text) else None


def named_model(columns: Mapping[str, Any], model_column: str) -> str | None:
    """The model that a row names; None where it names none."""
    value = columns.get(model_column)
    return None if value is None or value == "" else str(value)
