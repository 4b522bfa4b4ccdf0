"""Long sequences of which only one block is in memory: texts lie on the disk, the rest is read again.

What takes long to make of a row are its rendered texts. They are written as JSON to a file without a name, which goes
away with the sequence. Everything else is made from the table's row when a block is needed.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload

T = TypeVar("T")
Texts = list[list[str]]
"""The texts of each item of a block."""


class Spilled(Sequence[T], Generic[T]):
    """A sequence in blocks. All blocks but the last have the same size."""

    def __init__(self, make: Callable[[int, Texts], list[T]], directory: Path | None = None) -> None:
        """Start empty.

        Args:
            make: The items of a block, from the place of its first item and their texts.
            directory: Of the file; by default that of the system for temporary files.
        """
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self._make = make
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed with this object
        weakref.finalize(self, self._file.close)
        self._places: list[int] = []
        self._size = 0
        self._count = 0
        self._loaded: tuple[int, list[T]] = (-1, [])

    def append(self, texts: Texts) -> None:
        """Add a block; every one but the last has as many items as the first."""
        assert self._count == len(self._places) * self._size, "only the last block may be smaller"
        self._size = self._size or len(texts)
        self._places.append(self._file.seek(0, 2))
        self._file.write(json.dumps(texts).encode() + b"\n")
        self._count += len(texts)

    def where(self, condition: Callable[[T], bool]) -> Sequence[T]:
        """The items that meet a condition."""
        return _Chosen(self, [place for place, item in enumerate(self) if condition(item)])

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for number in range(len(self._places)):
            yield from self._block(number)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        place = index + self._count if index < 0 else index
        if not 0 <= place < self._count:
            raise IndexError(index)
        number, within = divmod(place, self._size)
        return self._block(number)[within]

    def _block(self, number: int) -> list[T]:
        if self._loaded[0] != number:
            self._file.seek(self._places[number])
            self._loaded = (number, self._make(number * self._size, json.loads(self._file.readline())))
        return self._loaded[1]


class _Chosen(Sequence[T], Generic[T]):
    """Some items of a spilled sequence, in its order."""

    def __init__(self, whole: Spilled[T], places: Sequence[int]) -> None:
        self._whole = whole
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._whole[place] for place in self._places[index]]
        return self._whole[self._places[index]]
