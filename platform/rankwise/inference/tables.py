"""Tables of rows on disk: JSONL, CSV and Parquet, read row by row and written whole or not at all.

A row is a dict of columns. JSONL keeps the types of JSON; in CSV every cell is a text; Parquet keeps its own types. A
line that is no row (not JSON, no object, too many cells) does not stop the reading: it comes as a row with an error.
"""

from __future__ import annotations

import csv
import datetime
import decimal
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
from rankwise.inference.arrow_types import to_array
from rankwise.settings import replacing

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
