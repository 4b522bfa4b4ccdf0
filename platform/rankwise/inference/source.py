"""The input of a prediction: surveyed, hashed and indexed in one pass, then read shard by shard.

The index says where each block of the input begins and what its digest is: the lines of one shard in JSONL and CSV, one
row group in Parquet. A job that answers some shards reads their blocks only, and checks them against the digests; what
lies before them it does not read.
"""

from __future__ import annotations

import base64
import codecs
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
from typing import Any, BinaryIO, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.digests import file_digest, hashing
from rankwise.exceptions import AssetError
from rankwise.inference.tables import (
    ArrowTypes,
    Row,
    csv_header,
    csv_rows,
    json_rows,
    parquet_rows,
    plain_row,
    row_groups,
    table_format,
)
from rankwise.reporter import Reporter
from rankwise.settings import Settings

HELD_BYTES = 64 << 20
"""Inputs up to this size are kept in memory by a process that answers all of their rows: it opens the file once."""
_CHUNK = 4 << 20
_INDEX_VERSION = 1

Number = Literal["int", "float"]
_PER_STEP = 1000
_LONGEST_NUMBER = 300
_READ: Mapping[str, type[int] | type[float]] = {"int": int, "float": float}
# Not those with zeros in front: they are names, such as postcodes.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


class InputChangedError(AssetError):
    """The input is not the one that the prediction began with.

    Attributes:
        digest: Of the input as it is now.
    """

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__(f"{path} changed while it was worked on; begin anew with --restart")
        self.digest = digest


@dataclass(frozen=True, kw_only=True)
class Block:
    """A stretch of the input that can be read without what lies before it.

    Attributes:
        row: Index of its first row.
        line: Lines before it; 0 for Parquet.
        start: Its first byte.
        end: The byte behind its last one.
        sha256: Of its bytes.
    """

    row: int
    line: int
    start: int
    end: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where the blocks of an input are.

    Attributes:
        input: Digest of the whole file.
        shard_rows: Rows of a shard, and of a block of JSONL or CSV.
        size: Bytes of the file.
        rest: SHA-256 of the bytes in no block: what lies before the first one (a CSV header) and behind the last one.
        blocks: In order.
        schema: The types of the columns as an Arrow schema in Base64, where they had to be inferred for the output.
    """

    input: str
    shard_rows: int
    size: int
    rest: str
    blocks: tuple[Block, ...]
    schema: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values; a block is a list, for there may be many."""
        return {**asdict(self), "format_version": _INDEX_VERSION, "blocks": [astuple(block) for block in self.blocks]}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self | None:
        """The inverse of `to_json`; None for another version."""
        if values.get("format_version") != _INDEX_VERSION:
            return None
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        blocks = (dict(zip(Block.__dataclass_fields__, block, strict=True)) for block in values["blocks"])
        return cls(**{**known, "blocks": tuple(Block(**block) for block in blocks)})


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


def survey_rows(
    rows: Iterable[Row],
    model_column: str,
    *,
    texts: bool,
    check: Callable[[Mapping[str, Any]], object] | None,
    advance: Callable[[int], None],
) -> Survey:
    """Count rows, columns and models.

    Args:
        rows: All rows of an input.
        model_column: The column in which a row may name its model.
        texts: Whether every cell is a text, as in CSV.
        check: Given the columns of each readable row.
        advance: Told of rows.
    """
    kinds: dict[str, set[str]] = {}
    numbers: dict[str, Number | None] = {}
    models: Counter[str] = Counter()
    count = unnamed = 0
    for row in rows:
        count += 1
        if count % _PER_STEP == 0:
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
        rows=count,
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


class Source:
    """An input file.

    `survey` reads all of it once; or `use` takes the index that an earlier pass has left. `rows` and `shards` then read
    blocks, each checked against its digest.
    """

    def __init__(self, path: Path, settings: Settings, *, hold: bool = False) -> None:
        """Name the file; with `hold`, read it into memory if it has at most `HELD_BYTES`.

        Raises:
            AssetError: It is missing, cannot be read, or changed while it was read.
        """
        self.path = path
        self._format = table_format(path)
        self._settings = settings
        self._content: bytes | None = None
        self._index: Index | None = None
        try:
            self._stat = path.stat()
            if hold and self._stat.st_size <= HELD_BYTES:
                with hashing(path, settings) as sha256:
                    self._content = path.read_bytes()
                    sha256.update(self._content)
                self._held_digest = f"sha256:{sha256.hexdigest()}"
        except OSError as error:
            if isinstance(error, AssetError):
                raise
            raise AssetError(f"cannot read {path}: {error.strerror or error}") from error

    @property
    def index(self) -> Index:
        """The index, which `survey` or `use` has set."""
        assert self._index is not None, "neither survey nor use was called"
        return self._index

    def digest(self, progress: Reporter) -> str:
        """The digest of the whole file; it is not read where the digest is known.

        Raises:
            AssetError: The file cannot be read.
        """
        if self._content is not None:
            return self._held_digest
        return file_digest(self.path, self._settings, progress=progress)

    def survey(self, output: Path, model_column: str, shard_rows: int, progress: Reporter) -> Survey:
        """Read all rows once: count, hash and index them, and refuse values that the output could not hold.

        Args:
            output: Where the answers go; values that it could not hold are refused now, not when all rows are answered.
            model_column: The column in which a row may name its model.
            shard_rows: Rows of a shard.
            progress: Told of rows.

        Raises:
            ConfigError: A value cannot be written to the output, or a header names a column twice.
            AssetError: The file cannot be read, or changed while it was read.
        """
        parquet, into_parquet = self._format == ".parquet", table_format(output) == ".parquet"
        types = ArrowTypes(output) if into_parquet and not parquet else None
        check: Callable[[Mapping[str, Any]], object] | None = None if types is None else types.add
        if parquet and not into_parquet:
            check = partial(plain_row, path=output)
        blocks: list[Block] = []
        with _read_errors(self.path), self._hashing() as sha256:
            rows = self._parquet_pass(sha256, blocks) if parquet else self._text_pass(sha256, blocks, shard_rows)
            with progress.task(f"looking through {self.path.name}", None, "rows") as advance:
                survey = survey_rows(rows, model_column, texts=self._format == ".csv", check=check, advance=advance)
            size = self._size()
            rest = self._rest(blocks, size)
        self._index = Index(
            input=f"sha256:{sha256.hexdigest()}",
            shard_rows=shard_rows,
            size=size,
            rest=rest,
            blocks=tuple(blocks),
            schema=None if types is None else _schema_text(types.types()),
        )
        return survey

    def use(self, index: Index) -> None:
        """Take the index of an earlier pass.

        Raises:
            InputChangedError: The file is not the one that was indexed; bytes within blocks are checked later.
            AssetError: The file cannot be read.
        """
        self._index = index
        if self._size() != index.size or self._rest(index.blocks, index.size) != index.rest:
            raise self._changed()

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since this object was made.

        Raises:
            InputChangedError: Its content is another one now.
            AssetError: It cannot be read.
        """
        try:
            same = _state(self.path.stat()) == _state(self._stat)
        except OSError as error:
            raise AssetError(f"cannot read {self.path}: {error.strerror or error}") from error
        if not same and file_digest(self.path, self._settings) != self.index.input:
            raise self._changed()

    def types(self) -> dict[str, pa.DataType]:
        """The columns with their types, for an output that has types."""
        if self._format == ".parquet":
            with _read_errors(self.path), self._parquet() as file:
                return {entry.name: entry.type for entry in file.schema_arrow}
        assert self.index.schema is not None, "the survey was made for an output without types"
        return _schema_types(self.index.schema)

    def rows(self, first: int = 0) -> Iterator[Row]:
        """All rows in order, from the row `first` on.

        Raises:
            InputChangedError: A block is not what was indexed.
            AssetError: The file cannot be read.
        """
        blocks = self.index.blocks
        number = max(bisect_right(blocks, first, key=lambda block: block.row) - 1, 0)
        if number < len(blocks):
            yield from islice(self._blocks(number), first - blocks[number].row, None)

    def shards(self, wanted: Collection[int], total_rows: int) -> Iterator[tuple[int, list[Row]]]:
        """The rows of some shards, in order; blocks that have none of them are not read.

        Args:
            wanted: Numbers of shards.
            total_rows: Rows of the input.

        Raises:
            InputChangedError: A block is not what was indexed.
            AssetError: The file cannot be read.
        """
        size, at = self.index.shard_rows, None
        rows: Iterator[Row] = iter(())
        for shard in sorted(wanted):
            first, end = shard * size, min(total_rows, (shard + 1) * size)
            if first != at:
                rows = self.rows(first)
            yield shard, list(islice(rows, end - first))
            at = end

    def _blocks(self, first: int) -> Iterator[Row]:
        """The rows of the blocks from `first` on."""
        with _read_errors(self.path):
            if self._format == ".parquet":
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
                lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="")
                yield from self._decode(lines, header, row=block.row, line=block.line)

    def _decode(self, lines: Iterable[str], header: Sequence[str] | None, *, row: int, line: int) -> Iterator[Row]:
        if header is None:
            return json_rows(lines, row=row, line=line)
        return csv_rows(lines, header, row=row, line=line)

    def _header(self) -> list[str] | None:
        """The header of CSV, which lies before the first block."""
        if self._format != ".csv" or not self.index.blocks:
            return None
        content = b"".join(self._chunks(0, self.index.blocks[0].start))
        return csv_header(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=""), self.path)

    def _check(self, block: Block, content: Iterable[bytes]) -> None:
        if _sha256(content) != block.sha256:
            raise self._changed()

    def _changed(self) -> AssetError:
        digest = file_digest(self.path, self._settings)
        if digest == self.index.input:
            return AssetError(f"the index of {self.path} is damaged: begin anew with --restart")
        return InputChangedError(self.path, digest)

    def _text_pass(self, whole: Any, blocks: list[Block], shard_rows: int) -> Iterator[Row]:
        """All rows of JSONL or CSV; hashes every byte and adds a block for each shard."""
        with self._open() as file:
            lines = _Lines(file, whole)
            header = csv_header(lines, self.path) if self._format == ".csv" else None
            if self._format == ".csv" and header is None:
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

    def _parquet_pass(self, whole: Any, blocks: list[Block]) -> Iterator[Row]:
        """All rows of Parquet; hashes every byte and adds a block for each row group, before it is decoded."""
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
                blocks.append(Block(row=own.row, line=0, start=own.start, end=own.end, sha256=block.hexdigest()))
                yield from parquet_rows(file, own, self.path)
        for chunk in self._chunks(hashed, self._size()):
            whole.update(chunk)

    def _hashing(self) -> AbstractContextManager[Any]:
        # What is held may be older than the file, whose digest must then not be remembered.
        return hashing(self.path, self._settings) if self._content is None else nullcontext(hashlib.sha256())

    def _rest(self, blocks: Sequence[Block], size: int) -> str:
        start, end = (blocks[0].start, blocks[-1].end) if blocks else (size, size)
        return _sha256([*self._chunks(0, start), *self._chunks(end, size)])

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._content is None else io.BytesIO(self._content)

    def _parquet(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path if self._content is None else pa.BufferReader(self._content))

    def _size(self) -> int:
        return self.path.stat().st_size if self._content is None else len(self._content)

    def _chunks(self, start: int, end: int) -> Iterator[bytes]:
        """A stretch of the file's bytes."""
        with self._open() as file:
            file.seek(start)
            while start < end and (chunk := file.read(min(_CHUNK, end - start))):
                start += len(chunk)
                yield chunk


class _Lines:
    """The lines of a text file from its start; counts and hashes what they take."""

    def __init__(self, file: BinaryIO, whole: Any) -> None:
        self.count = 0
        self._start = self._end = self._line = 0
        self._whole, self._block = whole, hashlib.sha256()
        mark = file.read(len(codecs.BOM_UTF8))
        if mark == codecs.BOM_UTF8:
            self._take(mark)
        else:
            file.seek(0)
        self._lines = io.TextIOWrapper(file, encoding="utf-8", newline="")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._take(line.encode())
        self.count += 1
        return line

    def cut(self, row: int) -> Block:
        """What was taken since the last cut."""
        block = Block(row=row, line=self._line, start=self._start, end=self._end, sha256=self._block.hexdigest())
        self._start, self._line, self._block = self._end, self.count, hashlib.sha256()
        return block

    def _take(self, content: bytes) -> None:
        self._end += len(content)
        self._whole.update(content)
        self._block.update(content)


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except AssetError:
        raise
    except UnicodeDecodeError as error:
        raise AssetError(
            f"{path} cannot be read: it is not UTF-8 text ({error}); convert it first, for instance with iconv -t UTF-8"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise AssetError(f"{path} cannot be read: {error}") from error


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
