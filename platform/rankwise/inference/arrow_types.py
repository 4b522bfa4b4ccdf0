"""The one type that Parquet gives a column, found out from rows piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from rankwise.exceptions import ConfigError

_AT_ONCE = 1024


class ArrowTypes:
    """Reads rows and keeps types only: an input may be larger than the memory."""

    def __init__(self, path: Path) -> None:
        """For a Parquet file that is to be written there."""
        self._path = path
        self._rows: list[Mapping[str, Any]] = []
        self._found: dict[str, pa.DataType] = {}

    def add(self, columns: Mapping[str, Any]) -> None:
        """Take one more row into account.

        Raises:
            ConfigError: No type holds its value beside those before.
        """
        self._rows.append(columns)
        if len(self._rows) == _AT_ONCE:
            self._look()

    def types(self) -> dict[str, pa.DataType]:
        """The type of each column.

        Raises:
            ConfigError: As `add`.
        """
        self._look()
        return self._found

    def _look(self) -> None:
        rows, self._rows = self._rows, []
        for name in dict.fromkeys(name for row in rows for name in row):
            with_type = to_array(name, (row.get(name) for row in rows), None, self._path).type
            before = self._found.get(name, pa.null())
            try:
                schemas = [pa.schema([(name, kind)]) for kind in (before, with_type)]
                self._found[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            except pa.ArrowException as error:
                raise _refusal(name, error, self._path) from error


def to_array(name: str, cells: Iterable[Any], kind: pa.DataType | None, path: Path) -> pa.Array:
    """A column's cells as Parquet has them; the type is found out where `kind` is None.

    Raises:
        ConfigError: They do not have that type, or any.
    """
    try:
        return pa.array(list(cells), type=kind)
    except (pa.ArrowException, OverflowError) as error:
        raise _refusal(name, error, path) from error


def _refusal(name: str, error: Exception, path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: the column {name!r} does not have one type, as Parquet needs it: {error}; write .jsonl"
    )
