"""Tables of rows on disk: JSONL, CSV and Parquet, read row by row and written whole or not at all.

A row is a dict of columns. JSONL keeps the types of JSON; in CSV every cell is a text; Parquet keeps its own types. A
line that is no row (not JSON, no object, too many cells) does not stop the reading: it comes as a row with an error.

- The one type that Parquet gives a column, found out from rows piece by piece.
- A first look at an input: how many rows, which columns of which types, which models its rows name.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.exceptions import AssetError, ConfigError
from rankwise.files import replacing
from rankwise.reporter import Reporter

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


SUFFIXES = (".jsonl", ".csv", ".parquet")
_ROWS_AT_ONCE = 1024
_ROWS_OF_A_GROUP = 16384
# Cells of a prompt may be long; the default of the csv module is 128 KiB.
_LONGEST_CELL = 64 << 20
_DEEPEST = 100
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of an input.

    Attributes:
        index: Its place, counted from 0.
        columns: Its columns; empty where it could not be read.
        error: Why it could not be read.
    """

    index: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def table_format(path: Path) -> str:
    """The format that a file's name says.

    Raises:
        ConfigError: None of those that are read and written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a table of rows ends in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}")
    return suffix


def read_rows(path: Path) -> Iterator[Row]:
    """All rows of a file, in order.

    Raises:
        ConfigError: The format is not known.
        AssetError: The file is missing or cannot be read.
    """
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[table_format(path)]
    try:
        yield from read(path)
    except FileNotFoundError as error:
        raise AssetError(f"there is no {path}; name a file of rows ({', '.join(SUFFIXES)})") from error
    except UnicodeDecodeError as error:
        raise AssetError(
            f"{path} cannot be read: it is not UTF-8 text ({error}); convert it first, for instance with iconv -t UTF-8"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise AssetError(f"{path} cannot be read: {error}") from error


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, pa.DataType | None]) -> None:
    """Write a table: a file of another name first, fsynced, then renamed.

    Args:
        path: Where; its suffix says the format.
        rows: The rows; a column that a row lacks is left out (JSONL), empty (CSV) or null (Parquet).
        columns: All columns in order, with their types, which only Parquet needs.

    Raises:
        ConfigError: A value cannot be written in this format, or does not have its column's type.
        StorageError: The disk is full, or the directory is not writable.
    """
    form = table_format(path)
    with replacing(path) as temporary:
        if form == ".parquet":
            _write_parquet(temporary, rows, columns, path)
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            (_write_jsonl if form == ".jsonl" else _write_csv)(file, rows, columns, path)


def parquet_types(path: Path) -> dict[str, pa.DataType]:
    """The columns of a Parquet file with their types."""
    return {entry.name: entry.type for entry in pq.read_schema(path)}


def plain_row(columns: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A row as JSON and CSV have it.

    Raises:
        ConfigError: A value, of a kind that is named, cannot be written to `path`.
    """
    return {name: _plain(value, name, path) for name, value in columns.items()}


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        index = 0
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Row(index=index, columns=_json_object(line))
            except ValueError as error:
                yield Row(index=index, error=f"line {number} {error}")
            index += 1


def _json_object(line: str) -> dict[str, Any]:
    """A line's columns; a ValueError says what they are in place of a row that can be worked on and written."""
    # Further in, reading or writing would end in Python's own limit, and with it the work on all other rows.
    if line.count("[") + line.count("{") > _DEEPEST and _depth(line) > _DEEPEST:
        raise ValueError(f"is nested more than {_DEEPEST} deep")
    try:
        columns = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(columns, dict):
        raise ValueError(f"must be a JSON object, got {type(columns).__name__}")
    if _SURROGATE.search(line):
        try:
            json.dumps(columns, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"has half of a character: {error}") from error
    return columns


def _depth(line: str) -> int:
    """How deep brackets are nested, those within texts apart."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(line):
        depth += (bracket in "[{") - (bracket in "]}")
        deepest = max(deepest, depth)
    return deepest


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Otherwise a quote that is not closed takes all lines behind it into one cell, unseen.
        reader = csv.reader(file, strict=True)
        header = next(reader, None)
        if header is None:
            return
        _check_names(path, header)
        index = 0
        while True:
            before = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                first, last = before + 1, reader.line_num
                where = f"line {last} is" if last <= first else f"lines {first} to {last} are"
                yield Row(index=index, error=f"{where} not CSV: {error}; is a quote not closed, or not doubled?")
                index += 1
                continue
            if not cells:
                continue
            if len(cells) == len(header):
                yield Row(index=index, columns=dict(zip(header, cells, strict=True)))
            else:
                yield Row(
                    index=index,
                    error=f"line {reader.line_num} has {len(cells)} cells, the header has {len(header)} columns",
                )
            index += 1


def _read_parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        _check_names(path, file.schema_arrow.names)
        index = 0
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            try:
                rows = batch.to_pylist()
            except (ValueError, OverflowError) as error:
                raise AssetError(
                    f"{path} cannot be read: in rows {index} to {index + len(batch) - 1} is a value that Python does "
                    f"not have, such as a time after the year 9999: {error}"
                ) from error
            for columns in rows:
                yield Row(index=index, columns=columns)
                index += 1


def _check_names(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{path}: the header names a column twice: {', '.join(twice)}; rename one of them")


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
    left = iter(rows)
    with pq.ParquetWriter(temporary, schema) as writer:
        while some := list(islice(left, _ROWS_OF_A_GROUP)):
            arrays = [to_array(name, (row.get(name) for row in some), kind, path) for name, kind in columns.items()]
            writer.write_table(pa.table(arrays, schema=schema))


def _plain(value: Any, column: str, path: Path) -> Any:
    """A value as JSON has it: times and decimals as texts, what is not a finite number as null."""
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
        f"{path}: the column {column!r} holds {type(value).__name__}, which {path.suffix} cannot hold; write .parquet, "
        "or leave the column out of the input"
    )


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
    path: Path, model_column: str, progress: Reporter, check: Callable[[Mapping[str, Any]], object] | None = None
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
