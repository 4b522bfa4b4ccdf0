"""A quick look at a definition's local data, before anything is loaded: the first rows of each file.

It finds what makes a run fail later: a missing or empty file, another separator or encoding, unknown columns, rows that
do not fit, rows that cannot fit into the length limit. Hub data sets, wheels and directories are not opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.assets.input_checks import confine
from rankwise.data.chat import text_of
from rankwise.data.formats import Conversion, RowMapping
from rankwise.data.rows import Side, single_sources
from rankwise.data.tables import TableRow, TextFormat, arrow_batches, batch_rows, cells
from rankwise.data.training_table import TEXT_KINDS, file_kind, text_file_rows
from rankwise.exceptions import AssetError, RankwiseError
from rankwise.experiment.schema import DatasetSpec, EvalSplit, ExperimentSpec
from rankwise.experiment.source import LocalSource, parse_source
from rankwise.settings import Settings

ROWS = 100
"""Rows that are read from each file."""
_SHOWN = 3


def check_local_data(spec: ExperimentSpec, settings: Settings) -> tuple[str, ...]:
    """Read the first rows of a definition's local files, and return what a run would refuse.

    Raises:
        ConfigError: A path is outside of `RANKWISE_DATA_ROOT`.
    """
    dataset = spec.dataset
    problems: list[str] = []
    limit = _LengthLimit.of(spec)
    sides: tuple[Side, ...] = ("train", "eval")
    for side in sides:
        for label, part in single_sources(dataset, side):
            # Of a list, each source is the `train` of its part, on both sides.
            path = _local_file(part.train if side == "train" or label else part.eval)
            if path is not None:
                problems += _check(confine(path, settings, "dataset"), part, side, limit)
    return tuple(dict.fromkeys(problems))


def _local_file(source: object) -> Path | None:
    parsed = parse_source(source) if isinstance(source, str) else None
    if not isinstance(parsed, LocalSource):
        return None
    path = Path(parsed.path).expanduser().absolute()
    return path if path.is_file() else None


def _check(path: Path, dataset: DatasetSpec, side: Side, limit: _LengthLimit | None) -> Iterator[str]:
    try:
        rows = list(islice(_rows(path, dataset), ROWS))
        unreadable = [f"{path}: {row.error}" for row in rows if row.error is not None]
        if unreadable:
            yield from unreadable[:_SHOWN]
            return
        if not rows:
            yield f"dataset.{side}: {path} has no rows"
            return
        columns = list(dict.fromkeys(name for row in rows for name in row.columns))
        kind = file_kind(path)
        rendered = [cells(row.columns, kind) if kind is not None else row.columns for row in rows]
        table = [{name: row.get(name) for name in columns} for row in rendered]
        mapping = RowMapping.of(dataset, columns, side, table)
    except RankwiseError as error:
        yield str(error)
        return
    conversions = []
    refused = []
    for number, row in enumerate(table):
        try:
            conversions.append(mapping.convert(row, str(number)))
        except RankwiseError as error:
            refused.append(str(error))
    yield from refused[:_SHOWN]
    if refused:
        return
    yield from _unusable(path, side, conversions, limit)
    used = sum(conversion.left_out is None for conversion in conversions)
    if side == "train" and len(rows) < ROWS and isinstance(dataset.eval, EvalSplit) and dataset.eval.rows >= used > 0:
        yield (
            f"dataset.eval.rows: {dataset.eval.rows:,} rows are to be split off, but {path} has {used:,}, and at least "
            "one must be left to train on; lower it"
        )


def _rows(path: Path, dataset: DatasetSpec) -> Iterator[TableRow]:
    if file_kind(path) in TEXT_KINDS:
        yield from text_file_rows(path, TextFormat(delimiter=dataset.delimiter, encoding=dataset.encoding))
        return
    try:
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as file:
                yield from batch_rows(file.iter_batches(batch_size=ROWS), path)
        else:
            yield from batch_rows(arrow_batches(path, path), path)
    except pa.ArrowException as error:
        raise AssetError(f"cannot read {path}: {error}") from error


def _unusable(path: Path, side: str, conversions: Sequence[Conversion], limit: _LengthLimit | None) -> Iterator[str]:
    used = [conversion for conversion in conversions if conversion.left_out is None]
    first = f"the first {len(conversions):,} rows" if len(conversions) == ROWS else f"the {len(conversions):,} rows"
    if not used:
        reasons = Counter(str(conversion.left_out) for conversion in conversions)
        why = ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items())
        yield f"dataset.{side}: none of {first} of {path} can be used: {why}"
    elif limit is not None and (shortest := limit.shortest_prompt(used)) is not None and shortest >= limit.max_length:
        yield (
            f"training.max_length: {limit.max_length:,} is too small for {first} of {path}: the shortest prompt alone "
            f"has {shortest:,} tokens; raise it, and see `rankwise preview` for all lengths"
        )


@dataclass(frozen=True)
class _LengthLimit:
    """Counts tokens of prompts, without what a chat template adds."""

    tokenizer: Any
    max_length: int

    @classmethod
    def of(cls, spec: ExperimentSpec) -> _LengthLimit | None:
        """The limit of a definition; None where it is swept, or the base's tokenizer is not a local file."""
        source = parse_source(spec.base_model)
        if not isinstance(source, LocalSource) or "training.max_length" in spec.sweep.parameters:
            return None
        file = Path(source.path).expanduser() / "tokenizer.json"
        if not file.is_file():
            return None
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_file(str(file)), spec.training.max_length)
        except Exception:  # Of no public type. A run reports a tokenizer that cannot be read.
            return None

    def shortest_prompt(self, conversions: Sequence[Conversion]) -> int | None:
        """Tokens of the shortest prompt; None for documents, which have none."""
        chats = [conversion.chat for conversion in conversions if conversion.chat is not None]
        if not chats:
            return None
        texts = ["\n".join(text_of(message) for message in chat.messages[: chat.answers[0]]) for chat in chats]
        return min(len(encoding.ids) for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False))
