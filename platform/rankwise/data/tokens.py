"""Encodes examples as tokens with a loss mask, and caches them (one Arrow file per rows, template, tokenizer, length).

N rows, T tokens of a row. An `EncodedSet` keeps all rows in two flat arrays, so that a large table costs five bytes a
token and not an object a row.

What must hold, and is checked on every answer of every row: the tokens of the prompt (rendered with the generation
prompt, which is what generation starts from) are the first tokens of the whole conversation. Then, and only then, what
follows the prompt is what generation has to produce, and the mask covers it up to the first end token.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rankwise.data.rows import answer_turns
from rankwise.data.template import Conversation, Renderer, RenderError
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
    input_ids: npt.NDArray[np.int32]
    """(T,)"""
    supervised: npt.NDArray[np.bool_]
    """(T,): token t is predicted, from position t-1, and counted. Never the first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSet(Sequence[Encoded]):
    """Encoded rows, in the order of the examples they come from, without those that did not fit."""

    ids: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    """(N + 1,): row n has the tokens from `offsets[n]` to `offsets[n + 1]`."""
    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    cut: tuple[str, ...] = ()
    """Rows that lost later turns to the length limit."""
    dropped: tuple[str, ...] = ()
    """Rows left out because not even their first answer fits into the length limit."""
    unended: tuple[str, ...] = ()
    """Rows with an answer that the template does not end with an end token."""
    longest: int = 0
    """Tokens of the longest row before the length limit."""

    @classmethod
    def of(
        cls,
        rows: Iterable[Encoded],
        *,
        cut: tuple[str, ...] = (),
        dropped: tuple[str, ...] = (),
        unended: tuple[str, ...] = (),
        longest: int = 0,
    ) -> EncodedSet:
        """Gather rows; without `longest` no row was longer than it is now."""
        gathered = list(rows)
        return cls(
            ids=tuple(row.id for row in gathered),
            offsets=np.cumsum([0, *(len(row.input_ids) for row in gathered)], dtype=np.int64),
            input_ids=np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in gathered)]).astype(np.int32),
            supervised=np.concatenate([np.empty(0, np.bool_), *(row.supervised for row in gathered)]).astype(np.bool_),
            cut=cut,
            dropped=dropped,
            unended=unended,
            longest=max([longest, *(len(row.input_ids) for row in gathered)]),
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
        for names in (self.ids, self.cut, self.dropped, self.unended):
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
) -> EncodedSet:
    """Tokens and loss masks of examples, from the cache where it has them.

    The mask of a row covers, for each answer, the assistant's tokens and the end token that makes generation stop. A
    row longer than `max_length` is cut after the last answer that fits whole (`cut`); where none fits the row is left
    out (`dropped`): no row ever teaches half an answer.

    Args:
        examples: What to encode.
        renderer: Tokenizer, chat template and end tokens; the one that the examples were made with.
        max_length: Most tokens of a row; None for no limit.
        settings: Where the cache is; None for no cache.
        progress: Reports finished rows.

    Raises:
        DatasetError: The tokens of a prompt are not the first tokens of prompt and answer, so that no mask would be
            right; the message says which part of the template or which rows break it.
        StorageError: The cache cannot be written.
    """
    if settings is None:
        return mask_examples(examples, renderer, max_length, progress)
    cache = TokenCache(settings.cache / "tokens")
    key = cache.key(examples, renderer, max_length)
    return cache.get(key, lambda: mask_examples(examples, renderer, max_length, progress))


def kept(examples: Sequence[Example], encoded: EncodedSet) -> list[Example]:
    """The examples that are in `encoded`, in its order: those that the length limit did not drop."""
    ids = set(encoded.ids)
    return [example for example in examples if example.id in ids]


BLOCK_ROWS = 2000
"""Rows whose texts are tokenized in one call: the tokenizer spreads a call over the cores."""
SHOWN_ROWS = 5
"""Rows that a message names."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """The texts of one answer."""

    prompt: str
    upto: str
    """The conversation up to and with this answer."""


@dataclass(frozen=True, kw_only=True)
class _Break:
    """An answer whose prompt is not the beginning of the conversation."""

    id: str
    prompt: str
    full: str
    history: bool
    """Whether the answer itself is rendered differently once later turns follow."""


def mask_examples(
    examples: Sequence[Example],
    renderer: Renderer,
    max_length: int | None,
    progress: Reporter | None = None,
) -> EncodedSet:
    """Tokens and masks of examples; see `encode`, which adds the cache.

    Raises:
        DatasetError: A prompt's tokens are not the first ones of the conversation's.
    """
    masked = _MaskedRows()
    with (progress or SILENT).task("tokenizing", len(examples), "rows") as advance:
        for first in range(0, len(examples), BLOCK_ROWS):
            block = examples[first : first + BLOCK_ROWS]
            turns = [_turns(example, renderer) for example in block]
            texts = list(dict.fromkeys(text for row in turns for turn in row for text in (turn.prompt, turn.upto)))
            tokens = dict(zip(texts, renderer.tokens(texts), strict=True))
            for example, row in zip(block, turns, strict=True):
                masked.add(example.id, _mask(example.id, row, tokens, renderer.end_token_ids), max_length)
            advance(len(block))
    if masked.breaks:
        raise DatasetError(_explain(masked.breaks, len(examples), renderer))
    return EncodedSet.of(
        masked.rows,
        cut=tuple(masked.cut),
        dropped=tuple(masked.dropped),
        unended=tuple(masked.unended),
        longest=masked.longest,
    )


@dataclass(frozen=True, kw_only=True)
class _Masked:
    """A whole row: its tokens, the span of tokens of each answer, and whether each answer has an end token."""

    tokens: list[int]
    spans: list[tuple[int, int]]
    ended: bool


@dataclass(kw_only=True)
class _MaskedRows:
    """What became of the rows so far."""

    rows: list[Encoded] = field(default_factory=list)
    breaks: list[_Break] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unended: list[str] = field(default_factory=list)
    longest: int = 0

    def add(self, row_id: str, masked: _Masked | _Break, max_length: int | None) -> None:
        """Sort a row in, within the length limit."""
        if isinstance(masked, _Break):
            self.breaks.append(masked)
            return
        if not masked.ended:
            self.unended.append(row_id)
        tokens = masked.tokens
        self.longest = max(self.longest, len(tokens))
        fitting = [span for span in masked.spans if max_length is None or span[1] <= max_length]
        if not fitting:
            self.dropped.append(row_id)
            return
        if len(fitting) < len(masked.spans):
            self.cut.append(row_id)
        if max_length is not None and len(tokens) > max_length:
            tokens = tokens[: fitting[-1][1]]
        supervised = np.zeros(len(tokens), np.bool_)
        for start, stop in fitting:
            supervised[start:stop] = True
        supervised[:1] = False  # nothing comes before the first token to predict it from
        self.rows.append(Encoded(id=row_id, input_ids=np.asarray(tokens, np.int32), supervised=supervised))


def _turns(example: Example, renderer: Renderer) -> list[_Turn]:
    places = answer_turns(example.messages)
    earlier: list[Conversation] = [example.messages[:place] for place in places[:-1]]
    upto: list[Conversation] = [example.messages[: place + 1] for place in places]
    try:
        prompts = [*renderer.texts(earlier, add_generation_prompt=True), example.prompt]
        texts = renderer.texts(upto)
    except RenderError as error:
        raise DatasetError(f"Row {example.id}: {error}") from error
    return [_Turn(prompt=prompt, upto=text) for prompt, text in zip(prompts, texts, strict=True)]


def _mask(row_id: str, turns: Sequence[_Turn], tokens: dict[str, list[int]], end: frozenset[int]) -> _Masked | _Break:
    full_text = turns[-1].upto
    full = tokens[full_text]
    spans = []
    all_ended = True
    for turn in turns:
        prompt, upto = tokens[turn.prompt], tokens[turn.upto]
        start = len(prompt)
        if upto[:start] != prompt:
            return _Break(id=row_id, prompt=turn.prompt, full=turn.upto, history=False)
        stop = next((place + 1 for place in range(start, len(upto)) if upto[place] in end), None)
        all_ended &= stop is not None
        stop = len(upto) if stop is None else stop
        if full[:stop] != upto[:stop]:
            return _Break(id=row_id, prompt=turn.upto, full=full_text, history=True)
        spans.append((start, stop))
    return _Masked(tokens=full, spans=spans, ended=all_ended)


def _explain(breaks: Sequence[_Break], count: int, renderer: Renderer) -> str:
    first = breaks[0]
    rows = ", ".join(each.id for each in breaks[:SHOWN_ROWS]) + (", ..." if len(breaks) > SHOWN_ROWS else "")
    head = f"The loss mask cannot be computed for {len(breaks):,} of {count:,} rows (rows {rows}): "
    same = next(
        (place for place, (a, b) in enumerate(zip(first.prompt, first.full, strict=False)) if a != b),
        min(len(first.prompt), len(first.full)),
    )
    shown = f"in row {first.id} they differ after {first.prompt[max(0, same - 40) : same]!r}"
    if first.history:
        return (
            f"{head}the chat template renders an earlier answer differently once more turns follow (it may leave out "
            f"the thinking of earlier turns): {shown}, with {first.prompt[same : same + 40]!r} against "
            f"{first.full[same : same + 40]!r}. Training would not match what generation sees. Use rows with one "
            "answer each, or a dataset.chat_template that does not change earlier turns"
        )
    if not first.full.startswith(first.prompt):
        return (
            f"{head}the chat template renders the prompt of a generation differently from the beginning of the whole "
            f"conversation: {shown}, with {first.prompt[same : same + 40]!r} in the prompt against "
            f"{first.full[same : same + 40]!r}. Training would not match what generation starts from. Set a "
            "dataset.chat_template whose add_generation_prompt part is the beginning of an assistant's turn"
        )
    prompt, full = renderer.tokens([first.prompt, first.full])
    place = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(prompt) - 1)
    decode = renderer.tokenizer.convert_ids_to_tokens
    return (
        f"{head}the tokenizer joins the end of the prompt and the beginning of the answer into one token: in row "
        f"{first.id} the prompt ends with {first.prompt[-20:]!r}, the answer begins with "
        f"{first.full[len(first.prompt) :][:20]!r}; the prompt's token {place} is {decode(prompt[place])!r} alone and "
        f"{decode(full[place])!r} with the answer. Let the answer begin, or the prompt end, without white space, or "
        "put a newline or a special token between them in the chat template"
    )


FORMAT = 1
"""Raised whenever the same key would give other tokens or another file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCache:
    """A directory of encoded sets. Safe for several processes: one makes an entry, the others wait for it."""

    directory: Path

    def key(self, examples: Sequence[Example], renderer: Renderer, max_length: int | None) -> str:
        """64 hex digits over the rows' ids and messages, the renderer and the length limit."""
        digest = hashlib.sha256(json.dumps([FORMAT, renderer.digest(), max_length]).encode())
        for example in examples:
            chat = [[message["role"], message["content"]] for message in example.messages]
            digest.update(json.dumps([example.id, example.prompt, chat]).encode())
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
            "rankwise.lost": json.dumps([encoded.cut, encoded.dropped, encoded.unended, encoded.longest]),
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
        metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        *lost, longest = json.loads(metadata["rankwise.lost"])
        cut, dropped, unended = (tuple(names) for names in lost)
        lists = _single(table, "input_ids")
        encoded = EncodedSet(
            ids=tuple(table.column("id").to_pylist()),
            offsets=np.asarray(lists.offsets, dtype=np.int64),
            input_ids=np.asarray(lists.values, dtype=np.int32),
            supervised=np.asarray(_single(table, "supervised").values.to_numpy(zero_copy_only=False), dtype=np.bool_),
            cut=cut,
            dropped=dropped,
            unended=unended,
            longest=longest,
        )
        digest = encoded.digest
        stored = metadata["rankwise.key"], metadata["rankwise.digest"]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise CorruptEntryError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if stored != (key, digest):
        raise CorruptEntryError(f"{path} has the digest {digest}, expected {stored[1]} for the key {stored[0]}")
    return encoded


def _single(table: pa.Table, name: str) -> pa.LargeListArray:
    chunks = table.column(name).chunks
    return chunks[0] if chunks else pa.array([], table.schema.field(name).type)
