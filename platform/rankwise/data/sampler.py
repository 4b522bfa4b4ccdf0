"""Which rows a micro-step trains on.

The order is a pure function of (rows, batch size, seed, micro-step), so that a resumed arm, another pack or another
machine draws the same rows, without a state to save. Epochs follow one another without a gap: a batch may hold the end
of one epoch and the start of the next, so that all batches are full.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sampler:
    """A seeded sequence of permutations of `count` rows, cut into batches.

    Args:
        count: Number of rows, at least 1.
        batch_size: Rows of a batch, at least 1. With fewer rows than that a batch is one whole epoch.
        seed: Seed of the order.

    Raises:
        ValueError: `count` or `batch_size` is below 1.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"A sampler needs at least 1 row, got count={self.count}")
        if self.batch_size < 1:
            raise ValueError(f"A sampler needs batch_size >= 1, got {self.batch_size}")

    @property
    def rows_per_batch(self) -> int:
        """Rows of every batch."""
        return min(self.batch_size, self.count)

    def indices(self, micro_step: int) -> list[int]:
        """The rows of micro-step `micro_step` (from 0).

        Raises:
            ValueError: `micro_step` is negative.
        """
        if micro_step < 0:
            raise ValueError(f"micro_step must be at least 0, got {micro_step}")
        first = micro_step * self.rows_per_batch
        picked = []
        for position in range(first, first + self.rows_per_batch):
            epoch, offset = divmod(position, self.count)
            picked.append(int(_permutation(self.count, self.seed, epoch)[offset]))
        return picked

    def epoch(self, number: int) -> list[int]:
        """The whole permutation of epoch `number` (from 0)."""
        return [int(index) for index in _permutation(self.count, self.seed, number)]


# Two entries per arm that is being trained: a batch touches at most two epochs.
@lru_cache(maxsize=64)
def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation by sorting raw Philox words.

    NB: not `Generator.permutation`: NumPy keeps the words of a bit generator stable between versions, and does not
    promise that for what a `Generator` makes of them (NEP 19).
    """
    key = int.from_bytes(hashlib.sha256(f"rankwise sampler {seed}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key, counter=[0, 0, 0, epoch]).random_raw(count)
    return np.argsort(words, kind="stable")
