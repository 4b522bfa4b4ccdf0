"""A key-value cache with one slot per row, so that rows enter and leave a batch independently.

Letters: S slots, N active rows (N <= S, in slots 0 to N-1), H heads of keys and values, C columns, D size of a head.

A token's column is its position in its row. A step writes one column of each row and reads a view of the rest; a
cache that grows by concatenation would copy all keys and values in every step. Columns past a row's end are masked and
zero, because a NaN left by an earlier row would get through a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, CacheLayerMixin

_COLUMNS = 64
"""Columns are allocated in multiples of this."""


@dataclass
class _Plan:
    slots: int
    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    positions: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    width: int = 0


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, (S, H, C, D) each."""

    is_sliding = False

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self._plan = plan

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = _empty(self._plan.slots, key_states)
        self.values = _empty(self._plan.slots, value_states)
        self.device = key_states.device
        self.is_initialized = True

    def reserve(self, columns: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _grown(self.keys, columns)
        self.values = _grown(self.values, columns)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column of each row, (N, H, 1, D), and return all columns in use, (N, H, width, D)."""
        plan = self._plan
        self.reserve(plan.width, key_states, value_states)
        self.keys[plan.rows, :, plan.positions] = key_states[:, :, 0]
        self.values[plan.rows, :, plan.positions] = value_states[:, :, 0]
        rows = key_states.shape[0]
        return self.keys[:rows, :, : plan.width], self.values[:rows, :, : plan.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._plan.width, 0

    def get_seq_length(self) -> int:
        return max(0, self._plan.width - 1)

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of all layers."""

    def __init__(self, slots: int, layers: int) -> None:
        """Create an empty cache for up to `slots` rows and so many layers with keys and values."""
        self._plan = _Plan(slots=slots)
        super().__init__(layers=[_SlotLayer(self._plan) for _ in range(layers)])

    def step(self, positions: torch.Tensor, width: int) -> None:
        """Set each row's position of its next token, (N,); `width` is the largest position plus one."""
        plan = self._plan
        if len(plan.rows) != len(positions):
            plan.rows = torch.arange(len(positions), device=positions.device)
        plan.positions, plan.width = positions, width

    def put(self, slots: Sequence[int], prefilled: Any) -> None:
        """Copy rows into slots from a prefilled cache, padded on the right: keys and values (len(slots), H, T, D)."""
        for mine, other in zip(self.layers, prefilled.layers, strict=True):
            columns = other.keys.shape[2]
            mine.reserve(columns, other.keys, other.values)
            where = torch.tensor(slots, device=other.keys.device)
            mine.keys[where, :, :columns] = other.keys
            mine.values[where, :, :columns] = other.values

    def clear(self, slots: slice) -> None:
        """Zero slots before new rows use them."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slots] = 0
                layer.values[slots] = 0

    def move(self, source: int, target: int) -> None:
        """Move a row to another slot, replacing its content."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]


def most_columns(columns: int) -> int:
    """Upper bound of allocated columns once so many are needed, however the cache grew."""
    before = columns - 1
    return _rounded(max(columns, before + before // 4))


def _rounded(columns: int) -> int:
    return -(-columns // _COLUMNS) * _COLUMNS


def _empty(slots: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros((slots, like.shape[1], 0, like.shape[3]))


def _grown(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """The tensor with at least so many columns; new ones are zero."""
    have = tensor.shape[2]
    if columns <= have:
        return tensor
    # Grow by at least a quarter, so each column is copied only a few times in total.
    wanted = _rounded(max(columns, have + have // 4))
    grown = tensor.new_zeros((*tensor.shape[:2], wanted, tensor.shape[3]))
    grown[:, :, :have] = tensor
    return grown
