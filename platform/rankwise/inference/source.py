"""Source: the input of a prediction, scanned once and then read by shards.

One pass counts, hashes and indexes the input. The index holds the byte range and digest of each block: the lines of
one shard in JSON lines, CSV and plain text, one row group in Parquet, everything in Arrow and in a JSON list. A job
reads only the blocks of its shards, and verifies them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.data.tables import (
    Kind,
    MarkError,
    TableRow,
    TextFormat,
    arrow_batches,
    arrow_schema,
    batch_rows,
    byte_mark,
    cells,
    csv_header,
    csv_rows,
    is_json_list,
    json_list,
    json_rows,
    parquet_rows,
    read_lines,
    row_groups,
    table_kind,
    text_rows,
    undecodable,
)
from rankwise.digests import file_digest, hashing
from rankwise.exceptions import AssetError, ConfigError
from rankwise.inference.output import ArrowTypes, output_format, plain_row
from rankwise.reporter import Reporter
from rankwise.settings import Settings

HELD_BYTES = 64 << 20
"""A process that answers all rows keeps inputs up to this size in memory."""
INPUT_TEXT = TextFormat(delimiter_key="--delimiter", encoding_key="--encoding")
"""How a text input is written, unless a request says otherwise."""
_TYPED: frozenset[Kind] = frozenset({"parquet", "arrow"})
_WHOLE: frozenset[Kind] = frozenset({"arrow", "json"})
_START = 4096
_CHUNK = 4 << 20
_INDEX_VERSION = 1

Number = Literal["int", "float"]
_PER_STEP = 1000
_LONGEST_NUMBER = 300
_PARSERS: Mapping[str, type[int] | type[float]] = {"int": int, "float": float}
# Texts with leading zeros are identifiers, such as postcodes.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


class InputChangedError(AssetError):
    """The input has changed since the prediction started; `digest` is that of its present content."""

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__(f"{path} changed during the prediction; start over with --restart")
        self.digest = digest


@dataclass(frozen=True, kw_only=True)
class InputBlock:
    """Bytes [start, end) of the input, which begin with row `row` after `line` lines (0 if it has none)."""

    row: int
    line: int
    start: int
    end: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class InputIndex:
    """Where the blocks of an input are.

    `shard_rows` is also the size of a JSONL or CSV block. `rest` is the SHA-256 of the bytes outside of all blocks,
    such as a CSV header. `schema` holds inferred column types as a Base64 Arrow schema, if the output needs them.
    """

    input: str
    shard_rows: int
    size: int
    rest: str
    blocks: tuple[InputBlock, ...]
    schema: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, with blocks as lists."""
        return {**asdict(self), "format_version": _INDEX_VERSION, "blocks": [astuple(block) for block in self.blocks]}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self | None:
        """The inverse of `to_json`; None for another format version."""
        if values.get("format_version") != _INDEX_VERSION:
            return None
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        blocks = (dict(zip(InputBlock.__dataclass_fields__, block, strict=True)) for block in values["blocks"])
        return cls(**{**known, "blocks": tuple(InputBlock(**block) for block in blocks)})


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Summary of an input: rows (also unreadable ones), type names of each column's values, and rows per model.

    `numbers` lists text columns (all of CSV) in which every text is a number: "int" or "float". Templates get numbers,
    as in training with `datasets`, so `{carat:.2f}` formats the same.
    """

    rows: int
    columns: Mapping[str, frozenset[str]]
    models: Mapping[str, int]
    unnamed: int
    numbers: Mapping[str, Number]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return {
            "rows": self.rows,
            "columns": {name: sorted(kinds) for name, kinds in self.columns.items()},
            "models": dict(self.models),
            "unnamed": self.unnamed,
            "numbers": dict(self.numbers),
        }

    def typed(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row with its numeric texts as numbers."""
        if not self.numbers:
            return columns
        return {
            name: _PARSERS[self.numbers[name]](value) if name in self.numbers and value != "" else value
            for name, value in columns.items()
        }


def survey_rows(
    rows: Iterable[TableRow],
    model_column: str,
    *,
    texts: bool,
    check: Callable[[Mapping[str, Any]], object] | None,
    advance: Callable[[int], None],
) -> Survey:
    """Count rows, columns and models; `texts`: every cell is a string; `check` gets each readable row."""
    kinds: dict[str, set[str]] = {}
    numbers: dict[str, Number | None] = {}
    models: Counter[str] = Counter()
    count = unnamed = 0
    for row in rows:
        count += 1
        if count % _PER_STEP == 0:
            advance(_PER_STEP)
        for name, value in row.columns.items():
            type_names = kinds.setdefault(name, set())
            if value is not None:
                type_names.add(type(value).__name__)
            if texts and value != "":
                numbers[name] = _wider(numbers.get(name, "int"), value)
        if row.error is None:
            if check is not None:
                check(row.columns)
            model = named_model(row.columns, model_column)
            if model is None:
                unnamed += 1
            else:
                models[model] += 1
    return Survey(
        rows=count,
        columns={name: frozenset(type_names) for name, type_names in kinds.items()},
        models=dict(models),
        unnamed=unnamed,
        numbers={name: kind for name, kind in numbers.items() if kind is not None},
    )


def _wider(kind: Number | None, text: str) -> Number | None:
    """The kind of number that also holds this text; None if it is not a number."""
    # Python limits the length of an integer text.
    if len(text) > _LONGEST_NUMBER:
        return None
    if kind == "int" and _INTEGER.fullmatch(text):
        return "int"
    return "float" if kind is not None and _NUMBER.fullmatch(text) else None


def named_model(columns: Mapping[str, Any], model_column: str) -> str | None:
    """The model that a row names, if any."""
    value = columns.get(model_column)
    return None if value is None or value == "" else str(value)


class Source:
    """An input file: `survey` it or `use` an earlier index, then read verified blocks with `rows` and `shards`."""

    def __init__(self, path: Path, settings: Settings, form: TextFormat = INPUT_TEXT, *, hold: bool = False) -> None:
        """Name the file; with `hold`, read it into memory if it has at most `HELD_BYTES`. `form` is that of a text.

        Raises:
            AssetError: It is missing, cannot be read, or changed while it was read.
        """
        self.path = path
        self._form = form
        self._settings = settings
        self._content: bytes | None = None
        self._index: InputIndex | None = None
        try:
            self._stat = path.stat()
            if hold and self._stat.st_size <= HELD_BYTES:
                with hashing(path, settings) as sha256:
                    self._content = path.read_bytes()
                    sha256.update(self._content)
                self._held_digest = f"sha256:{sha256.hexdigest()}"
            self.kind = self._kind()
        except OSError as error:
            if isinstance(error, AssetError):
                raise
            raise AssetError(f"cannot read {path}: {error.strerror or error}") from error

    def _kind(self) -> Kind:
        kind = table_kind(self.path)
        if kind != "json":
            return kind
        with self._read_errors(), self._open() as file, read_lines(file, self._form.encoding) as start:
            return "json" if is_json_list(start.read(_START)) else "lines"

    def values(self, row: TableRow) -> Mapping[str, Any]:
        """The values of a row, for templates: an empty cell of CSV has none."""
        return cells(row.columns, self.kind)

    @property
    def index(self) -> InputIndex:
        """The index; requires `survey` or `use`."""
        assert self._index is not None, "call survey or use first"
        return self._index

    def digest(self, progress: Reporter) -> str:
        """The digest of the whole file, from the cache of digests if possible.

        Raises:
            AssetError: The file cannot be read.
        """
        if self._content is not None:
            return self._held_digest
        return file_digest(self.path, self._settings, progress=progress)

    def survey(self, output: Path, model_column: str, shard_rows: int, progress: Reporter) -> Survey:
        """Read all rows once: count, hash and index them, and reject values that `output` cannot hold.

        Raises:
            ConfigError: The output cannot hold a value, or a column name occurs twice.
            AssetError: The file cannot be read, or changed while it was read.
        """
        typed, into_parquet = self.kind in _TYPED, output_format(output) == ".parquet"
        types = ArrowTypes(output) if into_parquet and not typed else None
        check: Callable[[Mapping[str, Any]], object] | None = None if types is None else types.add
        if typed and not into_parquet:
            check = partial(plain_row, path=output)
        blocks: list[InputBlock] = []
        with self._read_errors(), self._hashing() as sha256:
            if self.kind == "parquet":
                rows = self._parquet_pass(sha256, blocks)
            elif self.kind in _WHOLE:
                rows = self._whole_pass(sha256, blocks)
            else:
                rows = self._text_pass(sha256, blocks, shard_rows)
            with progress.task(f"scanning {self.path.name}", None, "rows") as advance:
                survey = survey_rows(rows, model_column, texts=self.kind == "csv", check=check, advance=advance)
            size = self._size()
            rest = self._rest(blocks, size)
        self._index = InputIndex(
            input=f"sha256:{sha256.hexdigest()}",
            shard_rows=shard_rows,
            size=size,
            rest=rest,
            blocks=tuple(blocks),
            schema=None if types is None else _schema_text(types.types()),
        )
        return survey

    def use(self, index: InputIndex) -> None:
        """Use the index of an earlier pass.

        Raises:
            InputChangedError: The file is not the indexed one; bytes within blocks are verified when they are read.
            AssetError: The file cannot be read.
        """
        self._index = index
        if self._size() != index.size or self._rest(index.blocks, index.size) != index.rest:
            raise self._changed()

    def check_unchanged(self) -> None:
        """Reject a file that has changed since this object was created.

        Raises:
            InputChangedError: Its content has changed.
            AssetError: It cannot be read.
        """
        try:
            same = _state(self.path.stat()) == _state(self._stat)
        except OSError as error:
            raise AssetError(f"cannot read {self.path}: {error.strerror or error}") from error
        if not same and file_digest(self.path, self._settings) != self.index.input:
            raise self._changed()

    def types(self) -> dict[str, pa.DataType]:
        """Column types, for a Parquet output."""
        if self.kind == "parquet":
            with self._read_errors(), self._parquet() as file:
                return {entry.name: entry.type for entry in file.schema_arrow}
        if self.kind == "arrow":
            with self._read_errors():
                return {entry.name: entry.type for entry in arrow_schema(self._arrow())}
        assert self.index.schema is not None, "the survey was made for an output without types"
        return _schema_types(self.index.schema)

    def rows(self, first: int = 0) -> Iterator[TableRow]:
        """All rows in order, from row `first` on.

        Raises:
            InputChangedError: A block does not match its digest.
            AssetError: The file cannot be read.
        """
        blocks = self.index.blocks
        number = max(bisect_right(blocks, first, key=lambda block: block.row) - 1, 0)
        if number < len(blocks):
            yield from islice(self._blocks(number), first - blocks[number].row, None)

    def shards(self, wanted: Collection[int], total_rows: int) -> Iterator[tuple[int, list[TableRow]]]:
        """The rows of the given shards, in order; other blocks are not read.

        Raises:
            InputChangedError: A block does not match its digest.
            AssetError: The file cannot be read.
        """
        size, at = self.index.shard_rows, None
        rows: Iterator[TableRow] = iter(())
        for shard in sorted(wanted):
            first, end = shard * size, min(total_rows, (shard + 1) * size)
            if first != at:
                rows = self.rows(first)
            yield shard, list(islice(rows, end - first))
            at = end

    def _blocks(self, first: int) -> Iterator[TableRow]:
        with self._read_errors():
            if self.kind in _WHOLE:
                for block in self.index.blocks:
                    self._check(block, self._chunks(block.start, block.end))
                    yield from self._whole()
                return
            if self.kind == "parquet":
                with self._parquet() as file:
                    groups = row_groups(file, self.path)
                    for block, own in zip(self.index.blocks[first:], groups[first:], strict=True):
                        self._check(block, self._chunks(block.start, block.end))
                        yield from parquet_rows(file, own, self.path)
                return
            header = self._header()
            for block in self.index.blocks[first:]:
                content = b"".join(self._chunks(block.start, block.end))
                self._check(block, [content])
                lines = io.TextIOWrapper(io.BytesIO(content), encoding=self._encoding(), newline="")
                yield from self._decode(lines, header, row=block.row, line=block.line)

    def _decode(self, lines: Iterable[str], header: Sequence[str] | None, *, row: int, line: int) -> Iterator[TableRow]:
        if self.kind == "text":
            return text_rows(lines, row=row)
        if header is None:
            return json_rows(lines, row=row, line=line)
        return csv_rows(lines, header, self._form.separator(self.path), row=row, line=line)

    def _header(self) -> list[str] | None:
        if self.kind != "csv" or not self.index.blocks:
            return None
        content = io.BytesIO(b"".join(self._chunks(0, self.index.blocks[0].start)))
        return csv_header(read_lines(io.BufferedReader(content), self._form.encoding), self.path, self._form)

    def _encoding(self) -> str:
        """The encoding of the lines, without a byte order mark."""
        return byte_mark(b"".join(self._chunks(0, 4)), self._form.encoding)[0]

    def _whole(self) -> Iterator[TableRow]:
        if self.kind == "arrow":
            yield from batch_rows(arrow_batches(self._arrow(), self.path), self.path)
            return
        with self._open() as file, read_lines(file, self._form.encoding) as text:
            try:
                for _, row in json_list(text):
                    yield row
            except AssetError as error:
                raise AssetError(f"{self.path} {error}") from error

    def _whole_pass(self, whole: Any, blocks: list[InputBlock]) -> Iterator[TableRow]:
        size = self._size()
        block = hashlib.sha256()
        for chunk in self._chunks(0, size):
            whole.update(chunk)
            block.update(chunk)
        blocks.append(InputBlock(row=0, line=0, start=0, end=size, sha256=block.hexdigest()))
        yield from self._whole()

    def _arrow(self) -> Any:
        return self.path if self._content is None else self._content

    def _check(self, block: InputBlock, content: Iterable[bytes]) -> None:
        if _sha256(content) != block.sha256:
            raise self._changed()

    def _changed(self) -> AssetError:
        digest = file_digest(self.path, self._settings)
        if digest == self.index.input:
            return AssetError(f"the index of {self.path} is damaged; start over with --restart")
        return InputChangedError(self.path, digest)

    def _text_pass(self, whole: Any, blocks: list[InputBlock], shard_rows: int) -> Iterator[TableRow]:
        with self._open() as file:
            lines = _Lines(file, self._form.encoding, whole)
            header = csv_header(lines, self.path, self._form) if self.kind == "csv" else None
            if self.kind == "csv" and header is None:
                return
            lines.cut(0)
            first, rows = 0, 0
            for row in self._decode(lines, header, row=0, line=lines.count):
                rows = row.index + 1
                yield row
                if rows % shard_rows == 0:
                    blocks.append(lines.cut(first))
                    first = rows
            if rows > first:
                blocks.append(lines.cut(first))
            if lines.end != self._size():
                raise AssetError(
                    f"{self.path}: its lines cannot be told apart in {self._form.encoding}, which writes the same "
                    "character in several ways; convert it to UTF-8"
                )

    def _parquet_pass(self, whole: Any, blocks: list[InputBlock]) -> Iterator[TableRow]:
        hashed = 0
        with self._parquet() as file:
            for own in row_groups(file, self.path):
                for chunk in self._chunks(hashed, own.start):
                    whole.update(chunk)
                block = hashlib.sha256()
                for chunk in self._chunks(own.start, own.end):
                    whole.update(chunk)
                    block.update(chunk)
                hashed = own.end
                blocks.append(InputBlock(row=own.row, line=0, start=own.start, end=own.end, sha256=block.hexdigest()))
                yield from parquet_rows(file, own, self.path)
        for chunk in self._chunks(hashed, self._size()):
            whole.update(chunk)

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        form = self._form
        try:
            yield
        except (AssetError, ConfigError):
            raise
        except UnicodeDecodeError as error:
            with self._open() as file:
                where = undecodable(file, form.encoding)
            raise AssetError(
                f"{self.path} {where}; set {form.encoding_key}, for instance to cp1252 or latin-1"
            ) from error
        except MarkError as error:
            raise AssetError(f"{self.path} {error}; set {form.encoding_key} to {error.encoding}") from error
        except (OSError, pa.ArrowException) as error:
            raise AssetError(f"{self.path} cannot be read: {error}") from error

    def _hashing(self) -> AbstractContextManager[Any]:
        # The content in memory may be older than the file; its digest must not enter the cache.
        return hashing(self.path, self._settings) if self._content is None else nullcontext(hashlib.sha256())

    def _rest(self, blocks: Sequence[InputBlock], size: int) -> str:
        start, end = (blocks[0].start, blocks[-1].end) if blocks else (size, size)
        return _sha256([*self._chunks(0, start), *self._chunks(end, size)])

    def _open(self) -> io.BufferedReader:
        return self.path.open("rb") if self._content is None else io.BufferedReader(io.BytesIO(self._content))

    def _parquet(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path if self._content is None else pa.BufferReader(self._content))

    def _size(self) -> int:
        return self.path.stat().st_size if self._content is None else len(self._content)

    def _chunks(self, start: int, end: int) -> Iterator[bytes]:
        with self._open() as file:
            file.seek(start)
            while start < end and (chunk := file.read(min(_CHUNK, end - start))):
                start += len(chunk)
                yield chunk


class _Lines:
    """The lines of a text file; counts and hashes them."""

    def __init__(self, file: io.BufferedReader, encoding: str, whole: Any) -> None:
        self.count = 0
        self.end = 0
        self._start = self._line = 0
        self._whole, self._block = whole, hashlib.sha256()
        self._encoding, mark = byte_mark(file.peek(4)[:4], encoding)
        self._take(file.read(len(mark)))
        self._lines = io.TextIOWrapper(file, encoding=self._encoding, newline="")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._take(line.encode(self._encoding))
        self.count += 1
        return line

    def cut(self, row: int) -> InputBlock:
        block = InputBlock(row=row, line=self._line, start=self._start, end=self.end, sha256=self._block.hexdigest())
        self._start, self._line, self._block = self.end, self.count, hashlib.sha256()
        return block

    def _take(self, content: bytes) -> None:
        self.end += len(content)
        self._whole.update(content)
        self._block.update(content)


def _sha256(chunks: Iterable[bytes]) -> str:
    sha256 = hashlib.sha256()
    for chunk in chunks:
        sha256.update(chunk)
    return sha256.hexdigest()


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _schema_text(types: Mapping[str, pa.DataType]) -> str:
    return base64.b64encode(pa.schema(list(types.items())).serialize().to_pybytes()).decode()


def _schema_types(text: str) -> dict[str, pa.DataType]:
    schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(text)))
    return {entry.name: entry.type for entry in schema}
