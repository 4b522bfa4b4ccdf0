"""Brings the input of a linear layer into the form (rows, tokens, features), whatever form a model calls it in.

Some architectures flatten rows and tokens before a linear layer (OPT's feed-forward, shared experts of mixtures), or
have heads as a further dimension (DeepSeek's `kv_b_proj`). The shape of the current batch, which the embedding sees
first, tells which elements belong to which row.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from rankwise.exceptions import ConfigError


class BatchShape:
    """Rows and tokens of a model's current batch."""

    def __init__(self) -> None:
        self.rows = 0
        self.tokens = 0

    def observe(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the embedding."""
        if isinstance(output, torch.Tensor) and output.dim() >= 3:
            self.rows, self.tokens = output.shape[:2]


_SHAPES: weakref.WeakKeyDictionary[nn.Module, BatchShape] = weakref.WeakKeyDictionary()


def batch_shape(model: Any) -> BatchShape:
    """The shape that follows a model's batches; one object per model."""
    shape = _SHAPES.get(model)
    if shape is None:
        shape = _SHAPES[model] = BatchShape()
        model.get_input_embeddings().register_forward_hook(shape.observe)
    return shape


class RowForm:
    """How one input is brought into the form (B, T, I), and an output back.

    Attributes:
        rows: `B`.
        inputs_per_token: How many columns of the entered form belong to each token, such as heads; mostly 1.
    """

    def __init__(self, x: torch.Tensor, batch: BatchShape, module: str) -> None:
        """Find out the form of `x`; `batch` may not have seen a batch yet.

        Raises:
            ConfigError: Which elements belong to which row cannot be told.
        """
        self._lead = lead = tuple(x.shape[:-1])
        self.inputs_per_token = 1
        self._heads_first = False
        self._plain = len(lead) == 2 and batch.rows in (0, lead[0])
        self.rows = lead[0] if self._plain else batch.rows
        if self._plain:
            return
        known = bool(batch.rows) and not is_expert(module)
        if known and lead in {(batch.rows * batch.tokens,), (1, batch.rows * batch.tokens)}:
            return
        if known and len(lead) == 3 and lead[:2] == (batch.rows, batch.tokens):
            self.inputs_per_token = lead[2]
        elif known and len(lead) == 3 and (lead[0], lead[2]) == (batch.rows, batch.tokens):
            self.inputs_per_token, self._heads_first = lead[1], True
        else:
            raise ConfigError(not_distinguished(module, x))

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, I), or (B, T * H, I) where each token has H inputs, those of a token together."""
        if self._plain:
            return x
        if self._heads_first:
            x = x.transpose(1, 2)
        return x.reshape(self.rows, -1, x.shape[-1])

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse of `enter`, for an output."""
        if self._plain:
            return y
        if self._heads_first:
            rows, heads, tokens = self._lead
            return y.view(rows, tokens, heads, y.shape[-1]).transpose(1, 2)
        return y.view(*self._lead, y.shape[-1])


def is_expert(module: str) -> bool:
    """Whether a module is a routed expert, whose input has the tokens that a router chose, in an order of its own."""
    return "experts" in module.split(".")


def not_distinguished(module: str, x: torch.Tensor) -> str:
    """The message for an input whose rows cannot be told apart."""
    return (
        f"module {module} is called with an input of shape {tuple(x.shape)}, so its rows cannot be distinguished "
        "(experts of a mixture are called like this); remove it from lora.target_modules"
    )
