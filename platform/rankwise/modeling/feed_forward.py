"""Gated feed-forwards that keep two of their widest tensors for the backward pass, and not three.

    down_proj(act_fn(gate_proj(x)) * up_proj(x))

The product's backward pass needs the activation's result beside what the activation itself keeps. Here it is computed
again from the gate, by the same function: gradients are the same to the bit, and a tensor of the feed-forward's width
is not kept (of SmolLM2's activations a fifth).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankwise.modeling.estimate import layer_of

logger = logging.getLogger(__name__)
_PARTS = ("gate_proj", "up_proj", "down_proj")

Activation = Callable[[torch.Tensor], torch.Tensor]


class _Lean:
    """The forward of one gated feed-forward."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self._module
        gate, up = module.gate_proj(x), module.up_proj(x)
        product: torch.Tensor = _Gated.apply(gate, up, module.act_fn)  # type: ignore[no-untyped-call]
        return module.down_proj(product)  # type: ignore[no-any-return]


class _Gated(torch.autograd.Function):
    """`act(gate) * up`, of which gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.act(leaf)
        (grad_gate,) = torch.autograd.grad(activated, leaf, grad * up)
        return grad_gate, activated.detach().mul_(grad), None


@contextmanager
def lean_feed_forwards(model: Any) -> Iterator[int]:
    """Run a model's gated feed-forwards this way inside the block; others are left alone.

    A module counts when it has `gate_proj`, `up_proj`, `down_proj` and `act_fn`, and when both ways give the same to
    the bit for a test input.

    Yields:
        How many modules run this way.
    """
    found = [module for module in model.modules() if _is_gated(module)]
    dtype = model.get_input_embeddings().weight.dtype
    agrees = {kind: _agrees(module, dtype) for kind, module in {type(module): module for module in found}.items()}
    lean = [module for module in found if agrees[type(module)]]
    for module in lean:
        module.forward = _Lean(module)
    try:
        yield len(lean)
    finally:
        for module in lean:
            del module.forward


def is_lean(linear: Mapping[str, Any]) -> bool:
    """Whether the feed-forward of a model's layers will run this way, from the names of its linear layers."""
    first = {name.rpartition(".") for name in linear if layer_of(name) == 0}
    parents = [parent for parent, _, name in first if name == _PARTS[0]]
    return len(parents) == 1 and {name for parent, _, name in first if parent == parents[0]} == set(_PARTS)


def _is_gated(module: Any) -> bool:
    parts = all(isinstance(getattr(module, name, None), nn.Module) for name in _PARTS)
    return parts and "forward" not in module.__dict__ and callable(getattr(module, "act_fn", None))


@torch.no_grad()
def _agrees(module: Any, dtype: torch.dtype) -> bool:
    layer = getattr(module.gate_proj, "base_layer", module.gate_proj)
    count = 2 * layer.in_features
    x = torch.linspace(-2, 2, count, device=layer.weight.device).to(dtype).view(1, 2, layer.in_features)
    if torch.equal(module(x), _Lean(module)(x)):
        return True
    logger.info("%s keeps its own forward: the lean one gives something else", type(module).__name__)
    return False
