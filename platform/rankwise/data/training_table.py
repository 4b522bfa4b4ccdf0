"""The tables that arms are trained and evaluated on, in the cache of this machine.

Text files keep what is written: the cells of CSV, the lines of JSON. They are read once, line by line, into an Arrow
file that is mapped into memory, so a file may be larger than memory. Parquet, Arrow, saved directories and hub data
sets have types of their own and are left to `datasets`; so is everything with rendering 1.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import pyarrow as pa

from rankwise.assets.dataset import ResolvedData, data_files, load_table, slice_of
from rankwise.data.tables import (
    KINDS,
    TEXT,
    Kind,
    MarkError,
    TableRow,
    TextFormat,
    cells,
    csv_header,
    csv_rows,
    is_json_list,
    json_list,
    json_object,
    json_rows,
    narrowed,
    read_lines,
    text_rows,
    undecodable,
)
from rankwise.exceptions import AssetError, ConfigError, DatasetError
from rankwise.files import ensure_entry
from rankwise.reporter import SILENT, Advance, Reporter
from rankwise.settings import Settings

if TYPE_CHECKING:
    from rankwise.experiment.schema import DatasetSpec

TEXT_KINDS: frozenset[Kind] = frozenset({"csv", "lines", "json", "text"})
_JSON = "json"
# Characters of a .json file that tell a list from lines.
_START = 4096
_ROWS_OF_A_BATCH = 1024
_SHOWN = 3
# Increase it when the same file gives another table, to invalidate the cache.
_VERSION = 1


class Table(Protocol):
    """Rows that are read when they are needed."""

    @property
    def column_names(self) -> Sequence[str]:
        """Every column that a row has."""

    def __len__(self) -> int: ...

    def __getitem__(self, column: str) -> Sequence[Any]: ...

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """All rows in order, as columns of up to `batch_size` rows; a missing column is None."""

    def select(self, positions: Sequence[int]) -> Table:
        """The rows at these positions."""


def open_table(
    dataset: DatasetSpec, resolved: ResolvedData, settings: Settings, progress: Reporter | None = None
) -> Table:
    """The rows of a definition's data set; read or downloaded once per content.

    Raises:
        AssetError: The data cannot be fetched or read, or require code.
        DatasetError: The split does not exist, or lines are not rows.
        ConfigError: The header repeats a name, or another character separates the cells.
        StorageError: The cache cannot be written.
    """
    if dataset.rendering == 1:
        return cast(Table, load_table(resolved, settings, progress))
    files = data_files(resolved)
    if not files or any(file_kind(file) not in TEXT_KINDS for file in files):
        return TypedTable(load_table(resolved, settings, progress))
    form = TextFormat(delimiter=dataset.delimiter, encoding=dataset.encoding)
    entry = settings.cache / "datasets" / _entry_name(resolved, files, form)

    def build(folder: Path) -> None:
        with (progress or SILENT).task(f"reading {resolved.source}", _size(files), "bytes") as advance:
            _write(files, form, folder, resolved.source, advance)

    ensure_entry(entry, settings, build, doing=f"reading {resolved.source}", private=True)
    table = TextTable.open(entry)
    chosen = slice_of(resolved.split, len(table))
    return table if chosen is None else table.select(chosen)


class TypedTable:
    """A `datasets.Dataset` whose numbers of 16 and 32 bits keep their shortest digits."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._types = {column.name: column.type for column in table.features.arrow_schema}

    @property
    def column_names(self) -> Sequence[str]:
        """The columns."""
        return list(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, column: str) -> Sequence[Any]:
        return narrowed(list(self._table[column]), self._types[column])

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """As `Table`."""
        for batch in self._table.iter(batch_size=batch_size):
            yield {name: narrowed(values, self._types[name]) for name, values in batch.items()}

    def select(self, positions: Sequence[int]) -> TypedTable:
        """As `Table`."""
        return TypedTable(self._table.select(positions))


class TextTable:
    """Rows of text files in an Arrow file of the cache: the cells of CSV and plain text, or the text of a JSON object.

    Only the batches that are read are in memory.
    """

    def __init__(self, reader: Any, columns: Sequence[str], kind: Kind, positions: Sequence[int] | None = None) -> None:
        self._reader = reader
        self._kind = kind
        self._positions = positions
        self.column_names = columns
        sizes = [_ROWS_OF_A_BATCH] * (reader.num_record_batches - 1)
        if reader.num_record_batches:
            sizes.append(reader.get_batch(reader.num_record_batches - 1).num_rows)
        self._starts = list(accumulate(sizes, initial=0))

    @classmethod
    def open(cls, entry: Path) -> TextTable:
        """Map an entry of the cache into memory."""
        facts = json.loads((entry / "table.json").read_text(encoding="utf-8"))
        return cls(pa.ipc.open_file(pa.memory_map(str(entry / "rows.arrow"))), facts["columns"], facts["kind"])

    def __len__(self) -> int:
        return self._starts[-1] if self._positions is None else len(self._positions)

    def __getitem__(self, column: str) -> Sequence[Any]:
        return [value for batch in self.iter(_ROWS_OF_A_BATCH) for value in batch[column]]

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """As `Table`."""
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            positions = range(start, stop) if self._positions is None else self._positions[start:stop]
            rows = [self._decoded(row) for row in self._stored(positions)]
            yield {name: [row.get(name) for row in rows] for name in self.column_names}

    def select(self, positions: Sequence[int]) -> TextTable:
        """As `Table`."""
        own = self._positions
        chosen = positions if own is None else [own[position] for position in positions]
        return TextTable(self._reader, self.column_names, self._kind, chosen)

    def _stored(self, positions: Sequence[int]) -> Iterator[dict[str, Any]]:
        number, batch = -1, None
        for position in positions:
            wanted = bisect_right(self._starts, position) - 1
            if wanted != number:
                number, batch = wanted, self._reader.get_batch(wanted)
            assert batch is not None
            row = position - self._starts[number]
            yield {name: batch.column(place)[row].as_py() for place, name in enumerate(batch.schema.names)}

    def _decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        return json_object(row[_JSON]) if self._kind in {"lines", "json"} else dict(cells(row, self._kind))


def file_kind(path: Path) -> Kind | None:
    """The kind of a file by its suffix, which may be followed by that of a compression; None if it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPEN:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _size(files: Sequence[Path]) -> int | None:
    return None if any(file.suffix.lower() in _OPEN for file in files) else sum(f.stat().st_size for f in files)


def _entry_name(resolved: ResolvedData, files: Sequence[Path], form: TextFormat) -> str:
    facts = {
        "revision": resolved.revision,
        "kinds": [file_kind(file) for file in files],
        # A directory has one digest, and several splits.
        "files": [file.name for file in files],
        "form": asdict(form),
        "separators": [form.separator(file) for file in files],
        "text": _VERSION,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _write(files: Sequence[Path], form: TextFormat, folder: Path, source: str, advance: Advance) -> None:
    kind = file_kind(files[0])
    assert kind is not None
    columns: dict[str, None] = {}
    problems: list[str] = []
    with ExitStack() as stack:
        stored = _Stored(folder / "rows.arrow", stack)
        for file in files:
            with _reading(file, form):
                for text, row in _rows(file, form, advance):
                    if row.error is not None:
                        problems.append(f"{file.name}: {row.error}" if len(files) > 1 else row.error)
                        continue
                    columns.update(dict.fromkeys(row.columns))
                    stored.add({_JSON: text} if kind in {"lines", "json"} else row.columns)
        stored.close(columns)
    if not problems and not stored.rows:
        raise DatasetError(f"{source} has no rows")
    if problems:
        more = f" (and {len(problems) - _SHOWN:,} more)" if len(problems) > _SHOWN else ""
        count = "1 row" if len(problems) == 1 else f"{len(problems):,} rows"
        raise DatasetError(f"{source}: {count} cannot be read: {'; '.join(problems[:_SHOWN])}{more}")
    facts = {"columns": list(columns), "kind": kind}
    (folder / "table.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


class _Stored:
    """Writes rows in batches; the first row has the columns."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        self._writer: Any = None
        self._schema = pa.schema([])
        self.rows = 0
        self._rows: list[Any] = []

    def add(self, row: Any) -> None:
        if self._writer is None:
            self._open(row)
        if list(row) != self._schema.names:
            raise DatasetError(
                f"{self._path.name}: the columns {', '.join(row)} are not those of the first file, "
                f"{', '.join(self._schema.names)}"
            )
        self._rows.append(row)
        self.rows += 1
        if len(self._rows) == _ROWS_OF_A_BATCH:
            self._flush()

    def close(self, columns: Iterable[str]) -> None:
        if self._writer is None:
            self._open(columns)
        self._flush()

    def _open(self, columns: Iterable[str]) -> None:
        self._schema = pa.schema([(name, pa.large_string()) for name in columns])
        self._writer = self._stack.enter_context(pa.ipc.new_file(str(self._path), self._schema))

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            arrays = [pa.array([row[name] for row in rows], pa.large_string()) for name in self._schema.names]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))


def text_file_rows(path: Path, form: TextFormat) -> Iterator[TableRow]:
    """The rows of a text file, from the first on.

    Raises:
        DatasetError: Its bytes are not text of the encoding.
        ConfigError: The header repeats a name, or another character separates the cells.
        AssetError: It cannot be read.
    """
    with _reading(path, form):
        for _, row in _rows(path, form, lambda _: None):
            yield row


def _rows(path: Path, form: TextFormat, advance: Advance) -> Iterator[tuple[str, TableRow]]:
    """The rows of a file, each with its text where it is JSON."""
    kind = file_kind(path)
    if kind == "json":
        with _opened(path) as file, read_lines(file, form.encoding) as start:
            kind = "json" if is_json_list(start.read(_START)) else "lines"
    with _opened(path) as file, read_lines(file, form.encoding) as decoded:
        text = _Lines(file, decoded, advance)
        if kind == "json":
            yield from json_list(text)
        elif kind == "lines":
            for row in json_rows(text):
                yield text.last, row
        else:
            header = [TEXT] if kind == "text" else csv_header(text, path, form)
            if header is None:
                return
            rows = text_rows(text) if kind == "text" else csv_rows(text, header, form.separator(path), line=text.count)
            for row in rows:
                yield "", row


class _Lines:
    """The lines of a file; reports how many bytes were read."""

    def __init__(self, file: io.BufferedReader, text: io.TextIOWrapper, advance: Advance) -> None:
        self.count = 0
        self.last = ""
        self._file, self._text, self._advance, self._reported = file, text, advance, 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        self.last = next(self._text)
        self.count += 1
        if self.count % _ROWS_OF_A_BATCH == 0:
            self._report()
        return self.last

    def read(self, size: int) -> str:
        """Text of at most `size` characters."""
        self._report()
        return self._text.read(size)

    def _report(self) -> None:
        read = self._file.tell()
        self._advance(read - self._reported)
        self._reported = read


def _open_plain(path: Path) -> Any:
    return path.open("rb")


_OPEN: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(str(path), compression="zstd"),
}


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    with _OPEN.get(path.suffix.lower(), _open_plain)(path) as file:
        yield file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)


@contextmanager
def _reading(path: Path, form: TextFormat) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        with _opened(path) as file:
            where = undecodable(file, form.encoding)
        raise DatasetError(f"{path} {where}; set {form.encoding_key}, for instance to cp1252 or latin-1") from error
    except ConfigError:
        raise
    except AssetError as error:
        raise DatasetError(f"{path} {error}") from error
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, pa.ArrowException) as error:
        raise AssetError(f"cannot read {path}: {error}") from error
    except MarkError as error:
        raise DatasetError(f"{path} {error}; set {form.encoding_key} to {error.encoding}") from error
