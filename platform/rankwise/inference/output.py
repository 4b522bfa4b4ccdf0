"""The output of a prediction: rows written atomically as JSONL, CSV or Parquet; `data.tables` reads."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
import uuid
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.exceptions import ConfigError
from rankwise.files import replacing

_AT_ONCE = 1024


class ArrowTypes:
    """Infers the Parquet type of each column row by row; keeps only types, so inputs may exceed memory."""

    def __init__(self, path: Path) -> None:
        """Infer types for a Parquet file at `path`."""
        self._path = path
        self._rows: list[Mapping[str, Any]] = []
        self._types: dict[str, pa.DataType] = {}

    def add(self, columns: Mapping[str, Any]) -> None:
        """Add one row.

        Raises:
            ConfigError: No type holds its value and the earlier ones.
        """
        self._rows.append(columns)
        if len(self._rows) == _AT_ONCE:
            self._infer()

    def types(self) -> dict[str, pa.DataType]:
        """The type of each column; raises ConfigError as `add`."""
        self._infer()
        return self._types

    def _infer(self) -> None:
        rows, self._rows = self._rows, []
        for name in dict.fromkeys(name for row in rows for name in row):
            with_type = to_array(name, (row.get(name) for row in rows), None, self._path).type
            before = self._types.get(name, pa.null())
            try:
                schemas = [pa.schema([(name, kind)]) for kind in (before, with_type)]
                self._types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            except pa.ArrowException as error:
                raise _refusal(name, error, self._path) from error


def to_array(name: str, cells: Iterable[Any], kind: pa.DataType | None, path: Path) -> pa.Array:
    """A column's cells as an Arrow array; `kind` None infers the type.

    Raises:
        ConfigError: The cells do not have that type, or no common one.
    """
    try:
        return pa.array(list(cells), type=kind)
    except (pa.ArrowException, OverflowError) as error:
        raise _refusal(name, error, path) from error


def _refusal(name: str, error: Exception, path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: column {name!r} has mixed types, which Parquet cannot store: {error}; write .jsonl instead"
    )


SUFFIXES = (".jsonl", ".csv", ".parquet")
_ROWS_OF_A_GROUP = 16384


def output_format(path: Path) -> str:
    """The format of an output, from its suffix.

    Raises:
        ConfigError: The suffix is not supported.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: an output must end in {', '.join(SUFFIXES)}; got {path.suffix or 'no suffix'!r}")
    return suffix


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, pa.DataType | None]) -> None:
    """Write a table atomically, in the format of the suffix of `path`.

    Args:
        path: The file.
        rows: A missing column is left out (JSONL), empty (CSV) or null (Parquet).
        columns: All columns in order; only Parquet needs their types.

    Raises:
        ConfigError: The format cannot hold a value, or a value does not have its column's type.
        StorageError: The disk is full, or the directory is not writable.
    """
    form = output_format(path)
    with replacing(path) as temporary:
        if form == ".parquet":
            _write_parquet(temporary, rows, columns, path)
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            (_write_jsonl if form == ".jsonl" else _write_csv)(file, rows, columns, path)


def plain_row(columns: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A row as JSON and CSV store it.

    Raises:
        ConfigError: `path` cannot hold a value; the message has its type.
    """
    return {name: _plain(value, name, path) for name, value in columns.items()}


def _write_jsonl(
    file: IO[str], rows: Iterable[Mapping[str, Any]], columns: Mapping[str, pa.DataType | None], path: Path
) -> None:
    for row in rows:
        plain = {name: _plain(row[name], name, path) for name in columns if name in row}
        file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")


def _write_csv(
    file: IO[str], rows: Iterable[Mapping[str, Any]], columns: Mapping[str, pa.DataType | None], path: Path
) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = []
        for name in columns:
            value = _plain(row.get(name), name, path)
            cells.append(json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value)
        writer.writerow(cells)


def _write_parquet(
    temporary: Path, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, pa.DataType | None], path: Path
) -> None:
    schema = pa.schema(list(columns.items()))
    remaining = iter(rows)
    with pq.ParquetWriter(temporary, schema) as writer:
        while chunk := list(islice(remaining, _ROWS_OF_A_GROUP)):
            arrays = [to_array(name, (row.get(name) for row in chunk), kind, path) for name, kind in columns.items()]
            writer.write_table(pa.table(arrays, schema=schema))


def _plain(value: Any, column: str, path: Path) -> Any:
    """A JSON value: times and decimals as strings, NaN and infinities as null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID | datetime.timedelta):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, column, path) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, column, path) for entry in value]
    raise ConfigError(
        f"{path}: column {column!r} holds {type(value).__name__}, which {path.suffix} cannot store; write .parquet, "
        "or remove the column from the input"
    )
