"""8-bit layers that keep nothing for the backward pass, since their weights are frozen.

bitsandbytes' product keeps its input, which only the gradient of a weight needs: a tensor for each layer, adapted or
not. It keeps it beside what autograd knows of, so that gradient checkpointing does not let go of it either. Here the
product is bitsandbytes' own, and the backward pass computes what its backward pass computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch

from rankwise.modeling.replaced_forward import replaced_forward


class _Lean:
    """The forward of one 8-bit layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self._layer)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    """A layer's output; the backward pass needs the layer only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        y: torch.Tensor = type(layer).forward(layer, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad, state = grads[0], ctx.layer.state
        weight = state.CB.to(grad.dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))
        product = grad.reshape(-1, grad.shape[-1]) @ weight
        return product.view(*grad.shape[:-1], weight.shape[1]), None


@contextmanager
def lean_8_bit_layers(model: Any) -> Iterator[int]:
    """Run a model's 8-bit layers this way inside the block.

    Yields:
        How many there are.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    with replaced_forward([(layer, _Lean(layer)) for layer in layers]):
        yield len(layers)
