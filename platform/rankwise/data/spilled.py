"""Long sequences of objects that lie on the disk, in blocks, with one block in memory at a time."""

from __future__ import annotations

import pickle
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload

T = TypeVar("T")


class Spilled(Sequence[T], Generic[T]):
    """A sequence in a file without a name, which goes away with it.

    All blocks but the last have the same size.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Open the file in `directory`, by default that of the system for temporary files."""
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        # Only this object can read it, so that unpickling is safe.
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed with this object
        weakref.finalize(self, self._file.close)
        self._places: list[int] = []
        self._size = 0
        self._count = 0
        self._loaded: tuple[int, list[T]] = (-1, [])

    def append(self, block: list[T]) -> None:
        """Add a block; every one but the last has as many items as the first."""
        assert self._count == len(self._places) * self._size, "only the last block may be smaller"
        self._size = self._size or len(block)
        self._places.append(self._file.seek(0, 2))
        pickle.dump(block, self._file, protocol=pickle.HIGHEST_PROTOCOL)
        self._count += len(block)

    def where(self, condition: Callable[[T], bool]) -> Spilled[T]:
        """The items that meet a condition."""
        return spill((item for item in self if condition(item)), self._size, self._directory)

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
            self._loaded = (number, pickle.load(self._file))
        return self._loaded[1]


def spill(items: Iterable[T], size: int, directory: Path | None = None) -> Spilled[T]:
    """Write items to the disk in blocks of `size`."""
    spilled: Spilled[T] = Spilled(directory)
    block: list[T] = []
    for item in items:
        block.append(item)
        if len(block) == max(1, size):
            spilled.append(block)
            block = []
    if block:
        spilled.append(block)
    return spilled
