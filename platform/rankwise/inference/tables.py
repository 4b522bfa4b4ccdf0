"""Table formats: read and write rows of JSONL, CSV and Parquet.

A row is a dict of columns. JSONL keeps JSON types, CSV cells are strings, Parquet keeps its own types. A line that is
not a valid row becomes a row with an error. The decoders start at any row; files are written atomically.
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
_ROWS_AT_ONCE = 1024
_ROWS_OF_A_GROUP = 16384
# Prompts may exceed the 128 KiB default of the csv module.
_LONGEST_CELL = 64 << 20
_DEEPEST = 100
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]')
# Length of the magic bytes before the first row group.
_MAGIC = 4
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of an input; `index` counts from 0, and `columns` is empty if `error` says why it cannot be read."""

    index: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def table_format(path: Path) -> str:
    """The format of a file, from its suffix.

    Raises:
        ConfigError: The suffix is not supported.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a table must end in {', '.join(SUFFIXES)}; got {path.suffix or 'no suffix'!r}")
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
    form = table_format(path)
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


def json_rows(lines: Iterable[str], *, row: int = 0, line: int = 0) -> Iterator[TableRow]:
    """Decode JSONL lines with untranslated endings; `row` and `line` count the rows and lines before them."""
    index = row
    for number, text in enumerate(lines, start=line + 1):
        content = text.rstrip("\r\n")
        if not content.strip():
            continue
        try:
            # JSON errors count characters; any line ending counts as one.
            yield TableRow(index=index, columns=_json_object(content if content == text else content + "\n"))
        except ValueError as error:
            yield TableRow(index=index, error=f"line {number} {error}")
        index += 1


def _json_object(line: str) -> dict[str, Any]:
    """The columns of a line; the ValueError of an invalid line completes "line N ..."."""
    # Deeper nesting exceeds Python's recursion limit, which would stop all other rows too.
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
            raise ValueError(f"has an unpaired surrogate: {error}") from error
    return columns


def _depth(line: str) -> int:
    deepest = depth = 0
    for bracket in _BRACKET.findall(line):
        depth += (bracket in "[{") - (bracket in "]}")
        deepest = max(deepest, depth)
    return deepest


def csv_header(lines: Iterable[str], path: Path) -> list[str] | None:
    """Read the CSV header; None if there are no lines.

    Raises:
        ConfigError: A column name occurs twice.
    """
    csv.field_size_limit(_LONGEST_CELL)
    header = next(csv.reader(lines, strict=True), None)
    if header is not None:
        _check_names(path, header)
    return header


def csv_rows(lines: Iterable[str], header: Sequence[str], *, row: int = 0, line: int = 0) -> Iterator[TableRow]:
    """Decode CSV lines after the header; arguments as in `json_rows`. A quoted cell may span lines."""
    csv.field_size_limit(_LONGEST_CELL)
    # Without strict, an unclosed quote silently takes all later lines into one cell.
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
            yield TableRow(
                index=index, error=f"{where} not CSV: {error}; check for a quote that is not closed or not doubled"
            )
            index += 1
            continue
        if not cells:
            continue
        if len(cells) == len(header):
            yield TableRow(index=index, columns=dict(zip(header, cells, strict=True)))
        else:
            yield TableRow(
                index=index,
                error=f"line {line + reader.line_num} has {len(cells)} cells, the header has {len(header)} columns",
            )
        index += 1


@dataclass(frozen=True, kw_only=True)
class RowGroups:
    """Parquet row groups in the bytes [start, end) of a file; `row` is the index of their first row."""

    numbers: tuple[int, ...]
    row: int
    start: int
    end: int


def row_groups(file: pq.ParquetFile, path: Path) -> list[RowGroups]:
    """Each row group of a file; all as one if they are not stored in order.

    Raises:
        ConfigError: A column name occurs twice.
    """
    _check_names(path, file.schema_arrow.names)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if not groups:
        return []
    columns = [[group.column(number) for number in range(group.num_columns)] for group in groups]
    starts = [min(map(_first_byte, own), default=_MAGIC) for own in columns]
    end = max((_first_byte(chunk) + chunk.total_compressed_size for own in columns for chunk in own), default=_MAGIC)
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


def parquet_rows(file: pq.ParquetFile, groups: RowGroups, path: Path) -> Iterator[TableRow]:
    """Decode row groups.

    Raises:
        AssetError: Python cannot represent a value.
    """
    index = groups.row
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=list(groups.numbers)):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError) as error:
            raise AssetError(
                f"{path} cannot be read: rows {index} to {index + len(batch) - 1} hold a value that Python "
                f"cannot represent, such as a time after the year 9999: {error}"
            ) from error
        for columns in rows:
            yield TableRow(index=index, columns=columns)
            index += 1


def _check_names(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{path}: the header repeats column names: {', '.join(repeated)}; rename one of each")


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
