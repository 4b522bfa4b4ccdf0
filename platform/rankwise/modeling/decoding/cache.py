"""Keys and values of rows that come and go: each row has a slot, and a token's column is its position in its row.

Letters: S slots, N rows in work (N <= S, in slots 0 to N-1), H heads of keys and values, C columns, D size of a head.

A cache that is grown by concatenation copies all keys and values of all rows in every step, and its rows must come and
go together. Here a step writes one column of each row and reads a view, and a finished row's slot is taken by another
row. Columns past a row's end are masked, and are zero: a NaN that a row before has left there would get through a mask.

Letters: N rows, I and O features in and out, R the ranks of all adapters together.

    y  +=  own(x A^T) B        A (R, I), B (R, O) with the scaling in it: all adapters' matrices one above the other

`own` sets what a row does not own, the columns of other adapters, to zero. Row by row this is the sum of
`modeling/lora_function.py`; that one makes two products for every adapter, of a single row each, and calls of tiny
products are most of what it takes. Here each matrix is read once, as there; the arithmetic that is thrown away is a
few percent of the base's, as long as R is small against O.

Nothing leaks: zeros are written, not multiplied in, and adapters with a B that is not finite are refused
(0 * inf = NaN); such adapters, and stacks that would take too much memory, go through the other way.

- LoRA of many adapters in a decoding step, where each row has one token: two products a layer for all adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional
from transformers import Cache, CacheLayerMixin

from rankwise.exceptions import ConfigError
from rankwise.modeling.lora.packed import not_plain, replaced_forward

_COLUMNS = 64
"""Columns are added in steps of at least so many."""


@dataclass
class _Plan:
    """Of the step in work, shared by all layers."""

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
        """Take heads, size and dtype from the first keys and values."""
        self.keys = _empty(self._plan.slots, key_states)
        self.values = _empty(self._plan.slots, value_states)
        self.device = key_states.device
        self.is_initialized = True

    def reserve(self, columns: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Have at least so many columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _grown(self.keys, columns)
        self.values = _grown(self.values, columns)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column of each row, (N, H, 1, D), and give all columns in use, (N, H, width, D)."""
        plan = self._plan
        self.reserve(plan.width, key_states, value_states)
        self.keys[plan.rows, :, plan.positions] = key_states[:, :, 0]
        self.values[plan.rows, :, plan.positions] = value_states[:, :, 0]
        rows = key_states.shape[0]
        return self.keys[:rows, :, : plan.width], self.values[:rows, :, : plan.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns in use, and the first of them."""
        return self._plan.width, 0

    def get_seq_length(self) -> int:
        """Columns before this step's, of the longest row."""
        return max(0, self._plan.width - 1)

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of all layers."""

    def __init__(self, slots: int, layers: int) -> None:
        """Hold no row yet.

        Args:
            slots: Most rows at a time.
            layers: Of the model that have keys and values.
        """
        self._plan = _Plan(slots=slots)
        super().__init__(layers=[_SlotLayer(self._plan) for _ in range(layers)])

    def step(self, positions: torch.Tensor, width: int) -> None:
        """Say where the next tokens go.

        Args:
            positions: (N,) position of each row's token.
            width: The largest of them, plus one.
        """
        plan = self._plan
        if len(plan.rows) != len(positions):
            plan.rows = torch.arange(len(positions), device=positions.device)
        plan.positions, plan.width = positions, width

    def put(self, slots: Sequence[int], prefilled: Any) -> None:
        """Take rows over that another cache holds from column 0 on, padded on the right.

        Args:
            slots: Where each row goes.
            prefilled: A cache with keys and values (len(slots), H, T, D).
        """
        for mine, other in zip(self.layers, prefilled.layers, strict=True):
            columns = other.keys.shape[2]
            mine.reserve(columns, other.keys, other.values)
            where = torch.tensor(slots, device=other.keys.device)
            mine.keys[where, :, :columns] = other.keys
            mine.values[where, :, :columns] = other.values

    def clear(self, slots: slice) -> None:
        """Make slots empty for the rows that come."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slots] = 0
                layer.values[slots] = 0

    def move(self, source: int, target: int) -> None:
        """Move a row to another slot, of which nothing stays."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]


def most_columns(columns: int) -> int:
    """Columns that there are at most once so many are needed, however the cache has grown to them."""
    before = columns - 1
    return _rounded(max(columns, before + before // 4))


def _rounded(columns: int) -> int:
    return -(-columns // _COLUMNS) * _COLUMNS


def _empty(slots: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros((slots, like.shape[1], 0, like.shape[3]))


def _grown(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """The same with at least so many columns; new ones are zero, since a NaN would get through a mask."""
    have = tensor.shape[2]
    if columns <= have:
        return tensor
    # By a quarter at least, so that all growing together copies each column a few times.
    wanted = _rounded(max(columns, have + have // 4))
    grown = tensor.new_zeros((*tensor.shape[:2], wanted, tensor.shape[3]))
    grown[:, :, :have] = tensor
    return grown


logger = logging.getLogger(__name__)


class StackedLora:
    """The stacked matrices of some adapters, and whose each row is.

    The matrices are copies of what the adapters hold when the stack is made.
    """

    def __init__(self, model: Any, adapters: Sequence[str]) -> None:
        """Stack adapters that `stackable` has let through."""
        self._forwards = [
            (layer, _StackedForward(self, layer, name, adapters))
            for name, layer in _layers(model)
            if any(adapter in layer.lora_A for adapter in adapters)
        ]
        self._order = {adapter: index for index, adapter in enumerate(adapters)}
        self._device = next(model.parameters()).device
        self._owners = torch.zeros(0, dtype=torch.int64)
        self._foreign: dict[tuple[int, ...], torch.Tensor | None] = {}
        self.rows = 0

    def assign(self, owners: Sequence[str | None]) -> None:
        """Say which adapter each row goes through; None is the bare base."""
        self.rows = len(owners)
        self._owners = torch.tensor([self._order.get(owner, -1) if owner else -1 for owner in owners])
        self._foreign.clear()

    def foreign(self, ranks: tuple[int, ...]) -> torch.Tensor | None:
        """Which columns are not a row's own, for a layer with these ranks: (N, R); None where all are."""
        if ranks not in self._foreign:
            columns = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
            foreign = columns[None] != self._owners[:, None]
            self._foreign[ranks] = foreign.to(self._device) if bool(foreign.any()) else None
        return self._foreign[ranks]

    def active(self) -> AbstractContextManager[None]:
        """Run the model's LoRA layers over the stack inside the block."""
        return replaced_forward(self._forwards)


class _StackedForward:
    """The forward of one LoRA layer."""

    def __init__(self, stack: StackedLora, layer: Any, module: str, adapters: Sequence[str]) -> None:
        self._stack = stack
        self._layer = layer
        self._module = module
        present = [name for name in adapters if name in layer.lora_A]
        self._ranks = tuple(layer.lora_A[name].weight.shape[0] if name in present else 0 for name in adapters)
        self._a = torch.cat([layer.lora_A[name].weight.detach() for name in present])
        self._b = torch.cat(
            [layer.lora_B[name].weight.detach().t() * float(layer.scaling[name]) for name in present]
        ).contiguous()

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = self._layer.base_layer(x, *args, **kwargs)
        if x.dim() != 3 or x.shape[0] != self._stack.rows or x.shape[1] != 1:
            raise ConfigError(
                f"module {self._module} is called with an input of shape {tuple(x.shape)}, so its rows cannot be told "
                "apart; take it out of lora.target_modules (experts of a mixture are called like that)"
            )
        if self._a.dtype != x.dtype or self._b.dtype != y.dtype:
            self._a, self._b = self._a.to(x.dtype), self._b.to(y.dtype)
        inner = functional.linear(x[:, 0], self._a)
        foreign = self._stack.foreign(self._ranks)
        if foreign is not None:
            inner.masked_fill_(foreign, 0.0)
        y[:, 0].addmm_(inner.to(y.dtype), self._b)
        return y


def stackable(model: Any, adapters: Sequence[str], free: int) -> bool:
    """Whether adapters may be stacked: plain LoRA, finite, and no more than the bytes in `free`."""
    layers = _layers(model)
    matrices = [
        matrix[name].weight
        for _, layer in layers
        for name in adapters
        if name in layer.lora_A
        for matrix in (layer.lora_A, layer.lora_B)
    ]
    needed = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
    if needed > free:
        logger.info(
            "adapters are run one after another in each layer: stacked they would take %d of %d MiB that may be used",
            needed >> 20,
            free >> 20,
        )
        return False
    return not not_plain(model, set(adapters)) and all(bool(torch.isfinite(matrix).all()) for matrix in matrices)


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
