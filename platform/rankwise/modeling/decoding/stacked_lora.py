"""LoRA of many adapters in one decoding step: two matrix products per layer for all adapters, one token per row.

Letters: N rows, I and O features in and out, R the sum of all adapters' ranks.

    y  +=  own(x A^T) B        A (R, I), B (R, O), scaled: the matrices of all adapters, stacked

`own` sets the columns of other adapters to zero in each row. The result equals that of `modeling.lora.function`, which
makes two products per adapter; with single rows, the calls take most of that time. The wasted arithmetic is a few
percent of the base's as long as R is small against O.

Adapters do not affect each other: zeros are written, not multiplied, and adapters with a B that is not finite are
refused (0 * inf = NaN). Those, and stacks that would take too much memory, use the packed forward.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from rankwise.exceptions import ConfigError
from rankwise.modeling.lora.packed import not_plain, replaced_forward
from rankwise.modeling.lora.row_shape import is_expert, not_distinguished

logger = logging.getLogger(__name__)


class StackedLora:
    """Copies of the adapters' matrices, stacked, and the adapter of each row."""

    def __init__(self, model: Any, adapters: Sequence[str]) -> None:
        """Stack adapters for which `stackable` is true."""
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
        """Set the adapter of each row; None is the bare base."""
        self.rows = len(owners)
        self._owners = torch.tensor([self._order.get(owner, -1) if owner else -1 for owner in owners])
        self._foreign.clear()

    def foreign(self, ranks: tuple[int, ...]) -> torch.Tensor | None:
        """Mask of columns that belong to other adapters, (N, R), for a layer with these ranks; None if all are own."""
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
        rows = self._stack.rows
        # One token a row; further dimensions, such as heads, are inputs of the same token.
        if x.dim() < 2 or x.shape[0] != rows or is_expert(self._module):
            raise ConfigError(not_distinguished(self._module, x))
        if self._a.dtype != x.dtype or self._b.dtype != y.dtype:
            self._a, self._b = self._a.to(x.dtype), self._b.to(y.dtype)
        inner = functional.linear(x.reshape(rows, -1, x.shape[-1]), self._a)
        foreign = self._stack.foreign(self._ranks)
        if foreign is not None:
            inner.masked_fill_(foreign[:, None], 0.0)
        y.view(-1, y.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]).to(y.dtype), self._b)
        return y


def stackable(model: Any, adapters: Sequence[str], free: int) -> bool:
    """Whether adapters can be stacked: plain LoRA, finite, and at most `free` bytes in total."""
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
            "adapters run one after another in each layer: stacked they would take %d of %d MiB available for it",
            needed >> 20,
            free >> 20,
        )
        return False
    return not not_plain(model, set(adapters)) and all(bool(torch.isfinite(matrix).all()) for matrix in matrices)


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
