"""Encoded rows to one padded batch of tensors.

B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rankwise.data.encoding import Encoded


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
