"""Batches: which rows each micro-step trains on (a seeded sampler), and padding them to one batch of tensors.

B rows, T tokens of the longest row.

The order is a pure function of (rows, batch size, seed, micro-step), so that a resumed arm, another pack or another
machine draws the same rows, without a state to save. An epoch is a whole number of optimizer steps: its last batch may
be smaller than the others, and its last step may have fewer batches, as in transformers' Trainer. Arms with rendering 1
keep epochs that follow one another without a gap, where a batch may hold the end of one and the start of the next.

With lengths, rows of similar length share a batch, so that little of it is padding: the permutation of an epoch is cut
into windows of up to 50 batches, each window is sorted by length, and its batches are taken in a random order. That
order depends on the window alone and not on the seed: arms of one pack with equal data and batch size then have long
batches at the same time, and short ones, and a pack pads little too. A smaller batch, or one that holds the end of an
epoch, is left as it is, so every row still comes once in an epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from rankwise.data.tokens import Encoded


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A padded batch. Padding is never attended to and never supervised, whichever token it is."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    attention_mask: torch.Tensor
    """(B, T) int64: 1 on a row's own tokens."""
    supervised: torch.Tensor
    """(B, T) bool: token t is predicted, from position t-1, and counted."""
    lengths: list[int]
    """Tokens of each row without padding."""
    ids: list[str]
    """`Example.id` of each row."""

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens that the loss counts."""
        return int(self.supervised.sum())


def collate(examples: Sequence[Encoded], pad_token_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """Pad rows to the longest of them: on the right for a loss, on the left for generation.

    Raises:
        ValueError: No rows.
    """
    if not examples:
        raise ValueError("collate needs at least one row")
    lengths = [len(example.input_ids) for example in examples]
    shape = (len(examples), max(lengths))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    supervised = torch.zeros(shape, dtype=torch.bool)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        place = slice(0, length) if side == "right" else slice(shape[1] - length, shape[1])
        input_ids[row, place] = torch.from_numpy(example.input_ids.astype("int64"))
        attention_mask[row, place] = 1
        supervised[row, place] = torch.from_numpy(example.supervised.copy())
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        supervised=supervised,
        lengths=lengths,
        ids=[example.id for example in examples],
    )


# As many batches as transformers' LengthGroupedSampler sorts together.
_WINDOW = 50
_WINDOW_SEED = -1
"""Not a seed that an arm can have."""


@dataclass(frozen=True)
class Sampler:
    """A seeded sequence of permutations of `count` rows, cut into batches.

    Args:
        count: Number of rows, at least 1.
        batch_size: Rows of a batch, at least 1. With fewer rows than that a batch is one whole epoch.
        seed: Seed of the order.
        lengths: Tokens of each row, to put rows of similar length together; None leaves the order to chance.
        whole_epochs: Whether an epoch ends with a batch.

    Raises:
        ValueError: `count` or `batch_size` is below 1, or there are not as many lengths as rows.
    """

    count: int
    batch_size: int
    seed: int
    lengths: tuple[int, ...] | None = None
    whole_epochs: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"A sampler needs at least 1 row, got count={self.count}")
        if self.batch_size < 1:
            raise ValueError(f"A sampler needs batch_size >= 1, got {self.batch_size}")
        if self.lengths is not None and len(self.lengths) != self.count:
            raise ValueError(f"A sampler of {self.count} rows needs as many lengths, got {len(self.lengths)}")

    @property
    def rows_per_batch(self) -> int:
        """Rows of every batch but the last one of an epoch."""
        return min(self.batch_size, self.count)

    @property
    def batches(self) -> int:
        """Batches of an epoch, with `whole_epochs`."""
        return -(-self.count // self.rows_per_batch)

    def micro_steps(self, step: int, accumulation: int) -> range:
        """The micro-steps of optimizer step `step` (from 0), each of which takes one batch."""
        if not self.whole_epochs:
            return range(step * accumulation, (step + 1) * accumulation)
        epoch, within = divmod(step, -(-self.batches // accumulation))
        first = epoch * self.batches + within * accumulation
        return range(first, min(first + accumulation, (epoch + 1) * self.batches))

    def indices(self, micro_step: int) -> list[int]:
        """The rows of micro-step `micro_step` (from 0).

        Raises:
            ValueError: `micro_step` is negative.
        """
        if micro_step < 0:
            raise ValueError(f"micro_step must be at least 0, got {micro_step}")
        first = self._first(micro_step)
        stop = self._first(micro_step + 1)
        full = stop - first == self.rows_per_batch and first // self.count == (stop - 1) // self.count
        if self.lengths is not None and full:
            return self._of_similar_length(micro_step)
        return [self._row(position) for position in range(first, stop)]

    def epoch(self, number: int) -> list[int]:
        """The whole permutation of epoch `number` (from 0)."""
        return [int(index) for index in _permutation(self.count, self.seed, number)]

    def _first(self, micro_step: int) -> int:
        """Where a batch begins in the sequence of all epochs."""
        if not self.whole_epochs:
            return micro_step * self.rows_per_batch
        epoch, batch = divmod(micro_step, self.batches)
        return epoch * self.count + batch * self.rows_per_batch

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        return int(_permutation(self.count, self.seed, epoch)[offset])

    def _of_similar_length(self, micro_step: int) -> list[int]:
        """A batch that lies within one epoch."""
        assert self.lengths is not None
        size = self.rows_per_batch
        # Batches first to last - 1 are full and lie within the epoch; windows are counted from its first.
        if self.whole_epochs:
            first = micro_step // self.batches * self.batches
            last = first + self.count // size
        else:
            epoch = micro_step * size // self.count
            first, last = -(-epoch * self.count // size), (epoch + 1) * self.count // size
        width = min(max(self.count // (4 * size), 1), _WINDOW)
        start = first + (micro_step - first) // width * width
        batches = min(width, last - start)
        begin = self._first(start)
        rows = [self._row(position) for position in range(begin, begin + batches * size)]
        rows.sort(key=lambda row: self.lengths[row])  # type: ignore[index]
        chosen = int(_permutation(batches, _WINDOW_SEED, start)[micro_step - start])
        return rows[chosen * size : (chosen + 1) * size]


# Three entries per arm that is being trained: a batch touches at most two epochs and a window.
@lru_cache(maxsize=128)
def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation by sorting raw Philox words.

    NB: not `Generator.permutation`: NumPy keeps the words of a bit generator stable between versions, and does not
    promise that for what a `Generator` makes of them (NEP 19).
    """
    key = int.from_bytes(hashlib.sha256(f"rankwise sampler {seed}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key, counter=[0, 0, 0, epoch]).random_raw(count)
    return np.argsort(words, kind="stable")
