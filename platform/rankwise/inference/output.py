"""The table of answers: each row's results and its input columns, in the order of the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rankwise.inference.answer import Answer
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


def write_output(source: Path, output: Path, answers: Iterable[Answer], columns: Sequence[str]) -> int:
    """Put the output together; how many rows have an error.

    Args:
        source: The input.
        output: Where the table goes.
        answers: One for each row of the input, in order.
        columns: The input's columns.

    Raises:
        ConfigError: A value cannot be written in the output's format.
        StorageError: The disk is full, or the directory is not writable.
    """
    own = parquet_types(source) if table_format(source) == ".parquet" else {}
    names = {name: f"input.{name}" if name in RESULTS else name for name in columns if name != _ID}
    # A row without an id of its own gets its place.
    types: dict[str, pa.DataType | None] = {_ID: own.get(_ID) if _ID in columns else pa.int64(), **RESULTS}
    types |= {shown: own.get(name) for name, shown in names.items()}
    failed = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal failed
        for row, answer in zip(read_rows(source), answers, strict=True):
            failed += answer.error is not None
            yield _row(row, answer, names)

    write_rows(output, rows(), types)
    return failed


def _row(row: Row, answer: Answer, names: Mapping[str, str]) -> dict[str, Any]:
    results = {name: getattr(answer, name) for name in RESULTS}
    return {
        _ID: row.columns.get(_ID, row.index),
        **{name: value for name, value in results.items() if value is not None},
        **{names[name]: value for name, value in row.columns.items() if name != _ID},
    }
