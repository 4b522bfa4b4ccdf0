"""Encodes examples as tokens with a loss mask, and caches them (one Arrow file per rows, template, tokenizer, length).

N rows, T tokens of a row. An `EncodedSet` keeps all rows in two flat arrays, so that a large table costs five bytes a
token and not an object a row.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rankwise.data.masks import SHOWN_ROWS, Break, Masked, Overlong, Supervise, answer_texts, explain, fit, mask
from rankwise.data.spilled import Spilled
from rankwise.data.template import Renderer
from rankwise.exceptions import DatasetError
from rankwise.files import file_lock, make_directory, storage_errors, write_atomically
from rankwise.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from rankwise.data.rows import Example
    from rankwise.data.template import Renderer
    from rankwise.settings import Settings


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """One row as tokens."""

    id: str
    """Of its example."""
    input_ids: npt.NDArray[np.int32]
    """(T,)"""
    supervised: npt.NDArray[np.bool_]
    """(T,): token t is predicted, from position t-1, and counted. Never the first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSet(Sequence[Encoded]):
    """Encoded rows, in the order of the examples they come from, without those that did not fit."""

    ids: tuple[str, ...]
    """Of each row's example: rows of one conversation have the same."""
    offsets: npt.NDArray[np.int64]
    """(N + 1,): row n has the tokens from `offsets[n]` to `offsets[n + 1]`."""
    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    cut: tuple[str, ...] = ()
    """Rows that lost answers to the length limit."""
    dropped: tuple[str, ...] = ()
    """Rows left out because of the length limit."""
    truncated: tuple[str, ...] = ()
    """Rows whose last answer was cut off by the length limit, so that its end token is not there."""
    unended: tuple[str, ...] = ()
    """Rows with an answer that the template does not end with an end token."""
    longest: int = 0
    """Tokens of the longest row before the length limit."""
    whole_lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """(M,): tokens of each example's longest row before the length limit, those of dropped ones too."""

    @classmethod
    def of(
        cls,
        rows: Iterable[Encoded],
        *,
        cut: tuple[str, ...] = (),
        dropped: tuple[str, ...] = (),
        truncated: tuple[str, ...] = (),
        unended: tuple[str, ...] = (),
        longest: int = 0,
        whole_lengths: Sequence[int] | None = None,
    ) -> EncodedSet:
        """Gather rows; without `longest` and `whole_lengths` no row was longer than it is now."""
        gathered = list(rows)
        return cls(
            ids=tuple(row.id for row in gathered),
            offsets=np.cumsum([0, *(len(row.input_ids) for row in gathered)], dtype=np.int64),
            input_ids=np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in gathered)]).astype(np.int32),
            supervised=np.concatenate([np.empty(0, np.bool_), *(row.supervised for row in gathered)]).astype(np.bool_),
            cut=cut,
            dropped=dropped,
            truncated=truncated,
            unended=unended,
            longest=max([longest, *(len(row.input_ids) for row in gathered)]),
            whole_lengths=np.asarray(
                [len(row.input_ids) for row in gathered] if whole_lengths is None else whole_lengths, np.int32
            ),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # negative indices, and IndexError beyond the end
        tokens = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Encoded(id=self.ids[row], input_ids=self.input_ids[tokens], supervised=self.supervised[tokens])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,): tokens of each row."""
        return np.diff(self.offsets)

    @property
    def supervised_lengths(self) -> npt.NDArray[np.int64]:
        """(N,): supervised tokens of each row."""
        running = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        return np.diff(running[self.offsets])

    def covering(self, share: float) -> int:
        """The smallest length limit that leaves this share of the examples whole; 0 without examples."""
        if not len(self.whole_lengths):
            return 0
        return int(np.sort(self.whole_lengths)[math.ceil(share * len(self.whole_lengths)) - 1])

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.offsets[-1])

    @property
    def supervised_tokens(self) -> int:
        """Tokens of all rows that the loss counts."""
        return int(self.supervised.sum())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (`sha256:...`) over ids, tokens, masks and what was cut, dropped or unended."""
        digest = hashlib.sha256(str(self.longest).encode())
        # Left out where there are none, as in sets of earlier releases.
        truncated = (self.truncated,) if self.truncated else ()
        for names in (self.ids, self.cut, self.dropped, self.unended, *truncated):
            digest.update(f"{len(names)}\x00".encode())
            for name in names:
                digest.update(f"{len(name)}\x00{name}".encode())
        for array in (self.offsets.astype("<i8"), self.input_ids.astype("<i4"), self.supervised.astype("<u1")):
            digest.update(np.ascontiguousarray(array).tobytes())
        return "sha256:" + digest.hexdigest()


def encode(
    examples: Sequence[Example],
    renderer: Renderer,
    max_length: int | None,
    settings: Settings | None = None,
    progress: Reporter | None = None,
    *,
    supervise: Supervise = "answers",
    overlong: Overlong = "auto",
) -> EncodedSet:
    """Tokens and loss masks of examples, from the cache where it has them.

    The mask of a row covers, for each answer, the assistant's tokens and the end token that makes generation stop (see
    `masks`). A conversation whose answers generation sees in different ways becomes several rows of the same id.

    Args:
        examples: What to encode.
        renderer: Tokenizer, chat template and end tokens; the one that the examples were made with.
        max_length: Most tokens of a row; None for no limit.
        settings: Where the cache is; None for no cache.
        progress: Reports finished rows.
        supervise: As `dataset.supervise`.
        overlong: What becomes of a row that is longer than `max_length`.

    Raises:
        DatasetError: The tokens of a prompt are not the first tokens of prompt and answer, so that no mask would be
            right; the message says which part of the template or which rows break it. Or a row is longer than
            `max_length` and `overlong` is `error`.
        StorageError: The cache cannot be written.
    """
    if settings is None:
        return mask_examples(examples, renderer, max_length, progress, supervise=supervise, overlong=overlong)
    cache = TokenCache(settings.cache / "tokens")
    key = cache.key(examples, renderer, max_length, supervise=supervise, overlong=overlong)
    return cache.get(
        key, lambda: mask_examples(examples, renderer, max_length, progress, supervise=supervise, overlong=overlong)
    )


def kept(examples: Sequence[Example], encoded: EncodedSet) -> Sequence[Example]:
    """The examples that are in `encoded`, in its order: those that the length limit did not drop."""
    ids = set(encoded.ids)
    if isinstance(examples, Spilled):
        return examples if len(ids) == len(examples) else examples.where(lambda example: example.id in ids)
    return [example for example in examples if example.id in ids]


BLOCK_ROWS = 2000
"""Rows whose texts are tokenized in one call: the tokenizer spreads a call over the cores."""


def mask_examples(
    examples: Sequence[Example],
    renderer: Renderer,
    max_length: int | None,
    progress: Reporter | None = None,
    *,
    supervise: Supervise = "answers",
    overlong: Overlong = "auto",
) -> EncodedSet:
    """Tokens and masks of examples; see `encode`, which adds the cache.

    Raises:
        DatasetError: A prompt's tokens are not the first ones of the conversation's, or a row is too long.
    """
    masked = _MaskedRows(max_length=max_length, overlong=overlong, everything=supervise == "all_tokens")
    with (progress or SILENT).task("tokenizing", len(examples), "rows") as advance:
        for first in range(0, len(examples), BLOCK_ROWS):
            block = examples[first : first + BLOCK_ROWS]
            chats = [answer_texts(each.chat, each.id, renderer, supervise, each.prompt) for each in block]
            answers = [chat for chat in chats if not isinstance(chat, Break)]
            texts = list(dict.fromkeys(text for row in answers for one in row for text in (one.prompt, one.text)))
            tokens = dict(zip(texts, renderer.tokens(texts), strict=True))
            for example, chat in zip(block, chats, strict=True):
                whole = chat if isinstance(chat, Break) else mask(example.id, chat, tokens, renderer.end_token_ids)
                masked.add(example.id, whole)
            advance(len(block))
    return masked.result(len(examples), renderer)


@dataclass(kw_only=True)
class _MaskedRows:
    """What became of the rows so far."""

    max_length: int | None
    overlong: Overlong
    everything: bool
    rows: list[Encoded] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unended: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, row_id: str, masked: Masked | Break) -> None:
        """Sort a row in, within the length limit."""
        if isinstance(masked, Break):
            self.breaks.append(masked)
            return
        if not masked.ended:
            self.unended.append(row_id)
        self.lengths.append(masked.longest)
        fitted = fit(masked, self.max_length, self.overlong, everything=self.everything)
        if not fitted.sequences:
            self.dropped.append(row_id)
        elif fitted.truncated:
            self.truncated.append(row_id)
        elif fitted.lost:
            self.cut.append(row_id)
        for tokens, supervised in fitted.sequences:
            self.rows.append(Encoded(id=row_id, input_ids=tokens, supervised=supervised))

    def result(self, count: int, renderer: Renderer) -> EncodedSet:
        """The set of `count` examples, once all are sorted in."""
        if self.breaks:
            raise DatasetError(explain(self.breaks, count, renderer))
        encoded = EncodedSet.of(
            self.rows,
            cut=tuple(self.cut),
            truncated=tuple(self.truncated),
            dropped=tuple(self.dropped),
            unended=tuple(self.unended),
            longest=max(self.lengths, default=0),
            whole_lengths=self.lengths,
        )
        if self.overlong == "error" and (encoded.dropped or encoded.cut):
            rows = [*encoded.dropped, *encoded.cut]
            shown = ", ".join(rows[:SHOWN_ROWS]) + (", ..." if len(rows) > SHOWN_ROWS else "")
            raise DatasetError(
                f"{len(rows):,} of {count:,} rows (rows {shown}) are longer than training.max_length={self.max_length} "
                f"and dataset.overlong is error; the longest has {encoded.longest:,} tokens, 99 % have at most "
                f"{encoded.covering(0.99):,}: raise training.max_length, or set dataset.overlong to drop or truncate"
            )
        return encoded


FORMAT = 2
"""Raised whenever the same key would give other tokens or another file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCache:
    """A directory of encoded sets. Safe for several processes: one makes an entry, the others wait for it."""

    directory: Path

    def key(
        self,
        examples: Sequence[Example],
        renderer: Renderer,
        max_length: int | None,
        *,
        supervise: Supervise = "answers",
        overlong: Overlong = "auto",
    ) -> str:
        """64 hex digits over the rows' ids and conversations, the renderer, the length limit and what is supervised."""
        facts = [FORMAT, renderer.digest(), max_length, supervise, overlong]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for example in examples:
            facts = [example.id, example.prompt, example.messages, example.tools, example.context]
            digest.update(json.dumps(facts, default=str).encode())
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """Where the entry of `key` lies."""
        return self.directory / f"{key}.arrow"

    def get(self, key: str, make: Callable[[], EncodedSet]) -> EncodedSet:
        """The entry of `key`; made and stored when it is not there or is not what was stored.

        Raises:
            StorageError: The cache cannot be written.
        """
        path = self.path(key)
        with storage_errors(path, "caching tokens"):
            make_directory(self.directory.parent, "caching tokens", shared=True)
            make_directory(self.directory, "caching tokens")
        with file_lock(path.with_suffix(".lock"), "caching tokens"):
            if path.exists():
                try:
                    return read(path, key)
                except CorruptEntryError as error:
                    logger.warning("rebuilding cached tokens: %s", error)
            made = make()
            write_atomically(path, to_bytes(made, key))
            return made


class CorruptEntryError(Exception):
    """Raised when a file is not the set of tokens that was stored in it."""


def to_bytes(encoded: EncodedSet, key: str) -> bytes:
    """An Arrow file with the columns id, input_ids and supervised; key, digest and what was cut are its metadata."""
    offsets = pa.array(encoded.offsets, pa.int64())
    table = pa.table(
        {
            "id": pa.array(encoded.ids, pa.string()),
            "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(encoded.input_ids, pa.int32())),
            "supervised": pa.LargeListArray.from_arrays(offsets, pa.array(encoded.supervised, pa.bool_())),
        }
    ).replace_schema_metadata(
        {
            "rankwise.key": key,
            "rankwise.digest": encoded.digest,
            "rankwise.lost": json.dumps(
                [encoded.cut, encoded.dropped, encoded.unended, encoded.truncated, encoded.longest]
            ),
            "rankwise.whole_lengths": encoded.whole_lengths.astype("<i4").tobytes(),
        }
    )
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def read(path: Path, key: str) -> EncodedSet:
    """Read an entry and check that it is the one of `key`, with the digest that was stored.

    Raises:
        CorruptEntryError: It is not an entry, or not the one that was stored.
    """
    try:
        with pa.ipc.open_file(path.read_bytes()) as reader:
            table = reader.read_all().combine_chunks()
        metadata = {name.decode(): value for name, value in (table.schema.metadata or {}).items()}
        *lost, longest = json.loads(metadata["rankwise.lost"])
        cut, dropped, unended, truncated = (tuple(names) for names in lost)
        lists = _single(table, "input_ids")
        encoded = EncodedSet(
            ids=tuple(table.column("id").to_pylist()),
            offsets=np.asarray(lists.offsets, dtype=np.int64),
            input_ids=np.asarray(lists.values, dtype=np.int32),
            supervised=np.asarray(_single(table, "supervised").values.to_numpy(zero_copy_only=False), dtype=np.bool_),
            cut=cut,
            dropped=dropped,
            unended=unended,
            truncated=truncated,
            longest=longest,
            whole_lengths=np.frombuffer(metadata["rankwise.whole_lengths"], "<i4"),
        )
        digest = encoded.digest
        stored = metadata["rankwise.key"].decode(), metadata["rankwise.digest"].decode()
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CorruptEntryError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if stored != (key, digest):
        raise CorruptEntryError(f"{path} has the digest {digest}, expected {stored[1]} for the key {stored[0]}")
    return encoded


def _single(table: pa.Table, name: str) -> pa.LargeListArray:
    chunks = table.column(name).chunks
    return chunks[0] if chunks else pa.array([], table.schema.field(name).type)
