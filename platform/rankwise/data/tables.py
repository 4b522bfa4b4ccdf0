"""Files of rows: CSV, TSV, JSON lines, JSON, plain text, Parquet and Arrow become rows, a dict of columns each.

| file | value of a cell |
|---|---|
| `.csv`, `.tsv` | the text as it is written; an empty cell has no value (`cells`) |
| `.jsonl`, `.ndjson`, `.json` (a list of objects, or one object a line) | what Python's `json` makes of it |
| `.txt` | a line, in the column `text`; blank lines are no rows |
| `.parquet`, `.arrow` | the stored type |

No type is guessed. A line that is not a valid row becomes a row with an error, and the lines after it are still read.
The decoders of lines start at any row.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.data.chat import without_nulls
from rankwise.exceptions import AssetError, ConfigError

Kind = Literal["csv", "lines", "json", "text", "parquet", "arrow"]
KINDS: Mapping[str, Kind] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Kinds of files by suffix."""
TEXT = "text"
"""The column of a `.txt` file."""
_ROWS_AT_ONCE = 1024
_CHUNK = 1 << 20
# Prompts may exceed the 128 KiB default of the csv module.
_LONGEST_CELL = 64 << 20
_DEEPEST = 100
# Of JSON, apart from strings and numbers: -Infinity, or an escape.
_LONGEST_TOKEN = 16
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]')
# Length of the magic bytes before the first row group.
_MAGIC = 4
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
          (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of a file; `index` counts from 0, and `columns` is empty if `error` says why it cannot be read."""

    index: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """How the text of a file is written.

    Attributes:
        delimiter: What separates cells of CSV; None: a comma, in `.tsv` a tab.
        encoding: As Python names it; a byte order mark may come before UTF-8 and comes before UTF-16 and UTF-32.
        delimiter_key: The setting that names the delimiter, for messages; so does `encoding_key`.
    """

    delimiter: str | None = None
    encoding: str = "utf-8"
    delimiter_key: str = "dataset.delimiter"
    encoding_key: str = "dataset.encoding"

    def separator(self, path: Path) -> str:
        """The delimiter of a file."""
        return self.delimiter or ("\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]] else ",")


def table_kind(path: Path, suffixes: Iterable[str] = KINDS) -> Kind:
    """The kind of a file, from its suffix.

    Raises:
        ConfigError: The suffix is not among `suffixes`.
    """
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise ConfigError(f"{path}: a table must end in {', '.join(suffixes)}; got {path.suffix or 'no suffix'!r}")
    return KINDS[suffix]


def cells(columns: Mapping[str, Any], kind: Kind) -> Mapping[str, Any]:
    """The values of a row: an empty cell of CSV has none."""
    if kind != "csv":
        return columns
    return {name: None if value == "" else value for name, value in columns.items()}


class MarkError(ValueError):
    """A byte order mark is missing or of another encoding; completes "FILE ...". `encoding` is the one to set."""

    def __init__(self, text: str, encoding: str) -> None:
        super().__init__(text)
        self.encoding = encoding


def byte_mark(start: bytes, encoding: str) -> tuple[str, bytes]:
    """The encoding of a text without a byte order mark, and the mark that the text starts with.

    Raises:
        MarkError: The mark is of another encoding.
    """
    known = codecs.lookup(encoding).name
    if known in {"utf-8", "utf-8-sig"}:
        for mark, name in _MARKS:
            if start.startswith(mark):
                raise MarkError(f"starts with the byte order mark of {name.upper()}", name)
        return "utf-8", codecs.BOM_UTF8 if start.startswith(codecs.BOM_UTF8) else b""
    if known in {"utf-16", "utf-32"}:
        for mark, name in _MARKS:
            if name == known and start.startswith(mark):
                order = "le" if mark in {codecs.BOM_UTF16_LE, codecs.BOM_UTF32_LE} else "be"
                return f"{known}-{order}", mark
        raise MarkError("has no byte order mark, so the order of its bytes is not known", f"{known}-le or {known}-be")
    return encoding, b""


def read_lines(file: io.BufferedReader, encoding: str) -> io.TextIOWrapper:
    """The lines of a file, with their endings as they are; a byte order mark is skipped.

    Raises:
        MarkError: The mark is of another encoding.
    """
    plain, mark = byte_mark(file.peek(4)[:4], encoding)
    file.read(len(mark))
    return io.TextIOWrapper(file, encoding=plain, newline="")


def undecodable(file: BinaryIO, encoding: str) -> str:
    """Where a file is not in an encoding; completes "FILE ..."."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, lines = 0, 1
    while True:
        chunk = file.read(_CHUNK)
        pending = decoder.getstate()[0]
        try:
            lines += decoder.decode(chunk, final=not chunk).count("\n")
        except UnicodeDecodeError as error:
            place = offset - len(pending) + error.start
            lines += error.object[: error.start].decode(encoding, "ignore").count("\n")
            wrong = error.object[error.start]
            return f"is not {encoding} text: byte 0x{wrong:02x} at {place:,} (line {lines:,}) begins no character of it"
        if not chunk:
            return f"is not {encoding} text"
        offset += len(chunk)


def json_rows(lines: Iterable[str], *, row: int = 0, line: int = 0) -> Iterator[TableRow]:
    """Decode JSON lines with untranslated endings; `row` and `line` count the rows and lines before them."""
    index = row
    for number, text in enumerate(lines, start=line + 1):
        content = text.rstrip("\r\n")
        if not content.strip():
            continue
        try:
            # JSON errors count characters; any line ending counts as one.
            yield TableRow(index=index, columns=json_object(content if content == text else content + "\n"))
        except ValueError as error:
            yield TableRow(index=index, error=f"line {number} {error}")
        index += 1


def json_object(line: str) -> dict[str, Any]:
    """The columns of a line; the ValueError of an invalid line completes "line N ..."."""
    # Deeper nesting exceeds Python's recursion limit, which would stop all other rows too.
    if line.count("[") + line.count("{") > _DEEPEST and _depth(line) > _DEEPEST:
        raise ValueError(f"is nested more than {_DEEPEST} deep")
    try:
        columns = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}{_cut_short(error, line)}") from error
    if not isinstance(columns, dict):
        raise ValueError(f"must be a JSON object, got {type(columns).__name__}")
    if _SURROGATE.search(line):
        try:
            json.dumps(columns, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"has an unpaired surrogate: {error}") from error
    return columns


def _cut_short(error: ValueError, text: str) -> str:
    ended = isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
    )
    return "; the line ends within a value: is the file cut short?" if ended else ""


def _depth(line: str) -> int:
    deepest = depth = 0
    for bracket in _BRACKET.findall(line):
        depth += (bracket in "[{") - (bracket in "]}")
        deepest = max(deepest, depth)
    return deepest


class Readable(Protocol):
    """A text that is read in pieces."""

    def read(self, size: int, /) -> str:
        """At most `size` characters; none at the end."""


def is_json_list(start: str) -> bool:
    """Whether a `.json` file that starts like this is a list of objects; otherwise it has one object a line."""
    return start.lstrip()[:1] == "["


def json_list(file: Readable) -> Iterator[tuple[str, TableRow]]:
    """Decode a file that is one list of objects, object by object: the text of each, and its row.

    Raises:
        AssetError: It is not a list; the message completes "FILE ...".
    """
    decoder = json.JSONDecoder()
    text, place, ended = "", 0, False

    def more() -> bool:
        nonlocal text, place, ended
        chunk = file.read(max(_CHUNK, len(text) - place))
        text, place, ended = text[place:] + chunk, 0, not chunk
        return bool(chunk)

    def skip(index: int) -> str:
        nonlocal place
        while True:
            while place < len(text) and text[place] in " \t\r\n":
                place += 1
            if place < len(text):
                return text[place]
            if not more():
                raise AssetError(f"is cut short: the list does not end after row {index - 1:,}")

    skip(0)
    place += 1
    if skip(0) == "]":
        return
    for index in itertools.count():
        skip(index)
        while True:
            try:
                _, end = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                if not _is_unfinished(error, text) or not more():
                    raise AssetError(f"is not JSON: row {index:,}: {error}") from error
                continue
            # A number may go on in the next chunk; an object does not.
            if end < len(text) or not more():
                break
        content = text[place:end]
        try:
            yield content, TableRow(index=index, columns=json_object(content))
        except ValueError as error:
            yield content, TableRow(index=index, error=f"row {index:,} {error}")
        place = end
        if (mark := skip(index + 1)) == "]":
            return
        if mark != ",":
            raise AssetError(f"is not JSON: row {index:,} is followed by {mark!r}, not by a comma")
        place += 1


def _is_unfinished(error: Exception, text: str) -> bool:
    """Whether a value may go on after the end of `text`."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_TOKEN


def text_rows(lines: Iterable[str], *, row: int = 0) -> Iterator[TableRow]:
    """Decode lines of plain text with untranslated endings; `row` counts the rows before them."""
    index = row
    for line in lines:
        content = line.rstrip("\r\n")
        if content.strip():
            yield TableRow(index=index, columns={TEXT: content})
            index += 1


def csv_header(lines: Iterable[str], path: Path, form: TextFormat) -> list[str] | None:
    """Read the CSV header; None if there are no lines.

    Raises:
        ConfigError: A column name occurs twice, or another character separates the cells.
    """
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = form.separator(path)
    header = next(csv.reader(lines, strict=True, delimiter=delimiter), None)
    if header is None:
        return None
    if len(header) == 1 and form.delimiter is None:
        for other in (";", "\t", "|", ","):
            if other in header[0] and other != delimiter:
                raise ConfigError(
                    f"{path}: the header is one column, {header[0]!r:.80}, so the cells seem to be separated by "
                    f"{other!r}; set {form.delimiter_key} to {other!r}, or to {delimiter!r} if this is one column"
                )
    _check_names(path, header)
    return header


def csv_rows(
    lines: Iterable[str], header: Sequence[str], delimiter: str = ",", *, row: int = 0, line: int = 0
) -> Iterator[TableRow]:
    """Decode CSV lines after the header; arguments as in `json_rows`. A quoted cell may span lines."""
    csv.field_size_limit(_LONGEST_CELL)
    # Without strict, an unclosed quote silently takes all later lines into one cell.
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    index = row
    while True:
        before = line + reader.line_num
        try:
            values = next(reader)
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
        if not values:
            continue
        if len(values) == len(header):
            yield TableRow(index=index, columns=dict(zip(header, values, strict=True)))
        else:
            yield TableRow(
                index=index,
                error=f"line {line + reader.line_num} has {len(values)} cells, the header has {len(header)} columns",
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
    batches = file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=list(groups.numbers))
    return batch_rows(batches, path, row=groups.row)


def arrow_batches(file: Path | bytes, path: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file or stream, such as `datasets` writes.

    Raises:
        ConfigError: A column name occurs twice.
    """
    with _arrow_reader(file) as reader:
        _check_names(path, reader.schema.names)
        if isinstance(reader, pa.RecordBatchFileReader):
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


def arrow_schema(file: Path | bytes) -> pa.Schema:
    """The types of the columns of an Arrow file or stream."""
    with _arrow_reader(file) as reader:
        return reader.schema


@contextmanager
def _arrow_reader(file: Path | bytes) -> Iterator[pa.RecordBatchReader]:
    with pa.memory_map(str(file)) if isinstance(file, Path) else pa.BufferReader(file) as source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
        with reader:
            yield reader


def batch_rows(batches: Iterable[pa.RecordBatch], path: Path, *, row: int = 0) -> Iterator[TableRow]:
    """Decode record batches; `row` counts the rows before them.

    Raises:
        AssetError: Python cannot represent a value.
    """
    index = row
    for whole in batches:
        for start in range(0, whole.num_rows, _ROWS_AT_ONCE):
            batch = whole.slice(start, _ROWS_AT_ONCE)
            try:
                columns = [
                    narrowed(column.to_pylist(), column.type) for column in (batch[name] for name in batch.schema.names)
                ]
            except (ValueError, OverflowError) as error:
                raise AssetError(
                    f"{path} cannot be read: rows {index} to {index + len(batch) - 1} hold a value that Python "
                    f"cannot represent, such as a time after the year 9999: {error}"
                ) from error
            for values in zip(*columns, strict=True) if columns else [()] * len(batch):
                yield TableRow(index=index, columns=dict(zip(batch.schema.names, values, strict=True)))
                index += 1


def narrowed(values: list[Any], kind: pa.DataType) -> list[Any]:
    """Python's values of a column.

    Numbers of 16 and 32 bits stay what they are, as their text depends on it. Mappings lose the keys without a value: a
    column of mappings has the keys of all rows in every row.
    """
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        scalar = np.float32 if pa.types.is_float32(kind) else np.float16
        return [value if value is None else scalar(value) for value in values]
    return [without_nulls(value) for value in values] if pa.types.is_nested(kind) else values


def _check_names(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{path}: the header repeats column names: {', '.join(repeated)}; rename one of each")
