"""Gated feed-forwards that keep two of their widest tensors for the backward pass, and not three.

    down_proj(act_fn(gate_proj(x)) * up_proj(x))

The product's backward pass needs the activation's result beside what the activation itself keeps. Here it is computed
again from the gate, by the same function: gradients are the same to the bit, and a tensor of the feed-forward's width
is not kept (of SmolLM2's activations a fifth).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankwise.experiment.module_names import layer_of

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
        return _times(act(gate), up, gate)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.act(leaf)
        (grad_gate,) = torch.autograd.grad(activated, leaf, grad * up)
        return grad_gate, _times(activated.detach(), grad, gate), None


def _times(activated: torch.Tensor, other: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The product, in the activation's memory where that is not the gate's: a linear activation gives its input."""
    shared = activated.untyped_storage().data_ptr() == gate.untyped_storage().data_ptr()
    return activated * other if shared else activated.mul_(other)


@contextmanager
def lean_feed_forwards(model: Any) -> Iterator[int]:
    """Run a model's gated feed-forwards this way inside the block; others are left alone.

    A module counts when it has `gate_proj`, `up_proj`, `down_proj` and `act_fn`, and when both ways give the same to
    the bit for a test input, small numbers and large ones. Each module is asked: layers of one type may differ.

    Yields:
        How many modules run this way.
    """
    found = [module for module in model.modules() if _is_gated(module)]
    dtype = model.get_input_embeddings().weight.dtype
    reasons = [_misfit(module, dtype) for module in found]
    lean = [module for module, reason in zip(found, reasons, strict=True) if reason is None]
    told = Counter((type(module).__name__, reason) for module, reason in zip(found, reasons, strict=True) if reason)
    for (name, reason), count in told.items():
        logger.info("%s keeps its own forward in %d of %d modules: %s", name, count, len(found), reason)
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


def _misfit(module: Any, dtype: torch.dtype) -> str | None:
    """Why a module cannot run the lean way; None if it can. A trial is no reason to end a training."""
    try:
        if not (_same_output(module, dtype) and _same_gradients(module, dtype)):
            return "the lean one gives something else"
    except Exception as error:
        return f"the trial ended with {type(error).__name__}: {error}"
    return None


@torch.no_grad()
def _same_output(module: Any, dtype: torch.dtype) -> bool:
    width = _first_layer(module).in_features
    x = torch.linspace(-2, 2, 2 * width, device=_first_layer(module).weight.device).view(1, 2, width)
    # Large ones too: what clamps its input shows there only.
    x = torch.cat([x, 1000 * x], dim=1).to(dtype)
    return _same(module(x), _Lean(module)(x))


@torch.enable_grad()
def _same_gradients(module: Any, dtype: torch.dtype) -> bool:
    """Of the product alone: the projections' are not touched."""
    numbers = torch.linspace(-8, 8, 64, device=_first_layer(module).weight.device).to(dtype)

    def gradients(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        gate, up = numbers.clone().requires_grad_(), numbers.flip(0).clone().requires_grad_()
        # Not on the leaves: an activation may work in place.
        made = product(gate.clone(), up.clone())
        return [made, *torch.autograd.grad(made, (gate, up), numbers + 1)]

    own = gradients(lambda gate, up: module.act_fn(gate) * up)
    lean = gradients(lambda gate, up: _Gated.apply(gate, up, module.act_fn))  # type: ignore[no-untyped-call]
    return all(map(_same, own, lean))


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def _first_layer(module: Any) -> Any:
    return getattr(module.gate_proj, "base_layer", module.gate_proj)
