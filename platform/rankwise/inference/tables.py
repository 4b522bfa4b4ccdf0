"""Formats of tables: JSONL, CSV and Parquet, decoded row by row and written whole or not at all.

A row is a dict of columns. JSONL keeps the types of JSON; in CSV every cell is a text; Parquet keeps its own types. A
line that is no row (not JSON, no object, too many cells) does not stop the reading: it becomes a row with an error.

The decoders start at any row, so that a part of an input is read without the rows before it. `ArrowTypes` infers the
type that Parquet gives a column.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import itertools
import json
import math
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.exceptions import AssetError, ConfigError
from rankwise.files import replacing

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
# Bytes at the start of a Parquet file, before its first row group.
_MAGIC = 4
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


def plain_row(columns: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A row as JSON and CSV have it.

    Raises:
        ConfigError: A value, of a kind that is named, cannot be written to `path`.
    """
    return {name: _plain(value, name, path) for name, value in columns.items()}


def json_rows(lines: Iterable[str], *, row: int = 0, line: int = 0) -> Iterator[Row]:
    """Decode lines of JSONL.

    Args:
        lines: The lines, their endings untranslated.
        row: Index of the first row.
        line: How many lines of the file come before.
    """
    index = row
    for number, text in enumerate(lines, start=line + 1):
        content = text.rstrip("\r\n")
        if not content.strip():
            continue
        try:
            # Errors of JSON count characters: an ending is one, whatever it is in the file.
            yield Row(index=index, columns=_json_object(content if content == text else content + "\n"))
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


def csv_header(lines: Iterable[str], path: Path) -> list[str] | None:
    """Take a CSV header from the lines of a file; None where there are no lines.

    Raises:
        ConfigError: It names a column twice.
    """
    csv.field_size_limit(_LONGEST_CELL)
    header = next(csv.reader(lines, strict=True), None)
    if header is not None:
        _check_names(path, header)
    return header


def csv_rows(lines: Iterable[str], header: Sequence[str], *, row: int = 0, line: int = 0) -> Iterator[Row]:
    """Decode lines of CSV behind the header; arguments as `json_rows`. A quoted cell may span lines."""
    csv.field_size_limit(_LONGEST_CELL)
    # Otherwise a quote that is not closed takes all lines behind it into one cell, unseen.
    reader = csv.reader(lines, strict=True)
    index = row
    while True:
        before = line + reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            first, last = before + 1, line + reader.line_num
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
                error=f"line {line + reader.line_num} has {len(cells)} cells, the header has {len(header)} columns",
            )
        index += 1


@dataclass(frozen=True, kw_only=True)
class RowGroups:
    """Row groups of a Parquet file that lie in one stretch of its bytes.

    Attributes:
        numbers: Which.
        row: Index of their first row.
        start: Their first byte.
        end: The byte behind their last one.
    """

    numbers: tuple[int, ...]
    row: int
    start: int
    end: int


def row_groups(file: pq.ParquetFile, path: Path) -> list[RowGroups]:
    """Each row group of a file; all as one where they do not lie one after another.

    Raises:
        ConfigError: Two columns have one name.
    """
    _check_names(path, file.schema_arrow.names)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if not groups:
        return []
    columns = [[group.column(number) for number in range(group.num_columns)] for group in groups]
    starts = [min(map(_first_byte, own), default=_MAGIC) for own in columns]
    end = max((_first_byte(each) + each.total_compressed_size for own in columns for each in own), default=_MAGIC)
    if any(before >= after for before, after in itertools.pairwise([*starts, end])):
        return [RowGroups(numbers=tuple(range(len(groups))), row=0, start=_MAGIC, end=max(end, _MAGIC))]
    rows = itertools.accumulate((group.num_rows for group in groups), initial=0)
    ends = [*starts[1:], end]
    return [
        RowGroups(numbers=(number,), row=row, start=start, end=end)
        for number, (row, start, end) in enumerate(zip(rows, starts, ends, strict=False))
    ]


def _first_byte(column: Any) -> int:
    dictionary = column.dictionary_page_offset
    return int(min(dictionary, column.data_page_offset) if dictionary else column.data_page_offset)


def parquet_rows(file: pq.ParquetFile, groups: RowGroups, path: Path) -> Iterator[Row]:
    """Decode row groups.

    Raises:
        AssetError: A value is not representable in Python.
    """
    index = groups.row
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=list(groups.numbers)):
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
