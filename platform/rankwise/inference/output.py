"""The table of answers: each row's results and its input columns, in the order of the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rankwise.inference.answer import Answer
from rankwise.inference.arrow_types import ArrowTypes
from rankwise.inference.survey import Survey
from rankwise.inference.tables import Row, parquet_types, read_rows, table_format, write_rows

# The columns that a row of the output has beside those of the input; those of the input with such a name get `input.`
# before it.
RESULTS: dict[str, pa.DataType] = {
    "text": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "model": pa.string(),
    "version": pa.string(),
    "adapter_sha256": pa.string(),
    "base_fingerprint": pa.string(),
    "error": pa.string(),
}
_ID = "id"


def write_output(source: Path, output: Path, answers: Iterable[Answer], found: Survey) -> int:
    """Put the output together; how many rows have an error.

    Args:
        source: The input.
        output: Where the table goes.
        answers: One for each row of the input, in order.
        found: What the input has.

    Raises:
        ConfigError: A value cannot be written in the output's format.
        StorageError: The disk is full, or the directory is not writable.
    """
    names = _names([name for name in found.columns if name != _ID])
    own = _types(source, output)
    # A row without an id of its own gets its place; in Parquet as a text, where the others are texts.
    texts = pa.types.is_string(own.get(_ID, pa.int64()))
    first = own.get(_ID) if _ID in found.columns else pa.int64()
    types: dict[str, pa.DataType | None] = {_ID: first, **RESULTS}
    types |= {shown: own.get(name) for name, shown in names.items()}
    failed = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal failed
        for row, answer in zip(read_rows(source), answers, strict=True):
            failed += answer.error is not None
            yield _row(row, answer, names, str(row.index) if texts else row.index)

    write_rows(output, rows(), types)
    return failed


def _names(columns: Sequence[str]) -> dict[str, str]:
    """What each input column is called in the output: no two the same, and none as a result is."""
    taken = {_ID, *RESULTS, *columns}
    names = {}
    for name in columns:
        shown = name
        if name in RESULTS:
            while shown in taken:
                shown = f"input.{shown}"
            taken.add(shown)
        names[name] = shown
    return names


def _types(source: Path, output: Path) -> dict[str, pa.DataType]:
    """The input's columns with their types, where the output has types."""
    if table_format(output) != ".parquet":
        return {}
    if table_format(source) == ".parquet":
        return parquet_types(source)
    types = ArrowTypes(output)
    for row in read_rows(source):
        types.add(row.columns)
    return types.types()


def _row(row: Row, answer: Answer, names: Mapping[str, str], place: int | str) -> dict[str, Any]:
    results = {name: getattr(answer, name) for name in RESULTS}
    return {
        _ID: row.columns.get(_ID, place),
        **{name: value for name, value in results.items() if value is not None},
        **{names[name]: value for name, value in row.columns.items() if name != _ID},
    }
