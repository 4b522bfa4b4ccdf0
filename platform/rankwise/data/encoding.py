"""Examples to tokens with a loss mask, cached.

N rows, T tokens of a row. An `EncodedSet` keeps all rows in two flat arrays, so that a large table costs five bytes a
token and not an object a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rankwise.assets.progress import Progress
    from rankwise.data.renderer import Renderer
    from rankwise.data.rows import Example
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
    progress: Progress | None = None,
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
        progress: Told of rows done.

    Raises:
        DatasetError: The tokens of a prompt are not the first tokens of prompt and answer, so that no mask would be
            right; the message says which part of the template or which rows break it.
        StorageError: The cache cannot be written.
    """
    from rankwise.data.masking import mask_examples
    from rankwise.data.token_cache import TokenCache

    if settings is None:
        return mask_examples(examples, renderer, max_length, progress)
    cache = TokenCache(settings.cache / "tokens")
    key = cache.key(examples, renderer, max_length)
    return cache.get(key, lambda: mask_examples(examples, renderer, max_length, progress))


def kept(examples: Sequence[Example], encoded: EncodedSet) -> list[Example]:
    """The examples that are in `encoded`, in its order: those that the length limit did not drop."""
    ids = set(encoded.ids)
    return [example for example in examples if example.id in ids]
