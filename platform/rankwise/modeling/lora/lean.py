"""Trade memory and time: cached dequantized weights, and lean backward passes of 8-bit layers and feed-forwards.

Dequantized weights are cached on a CPU that has the memory to spare.

On a CPU, each forward and each backward of a 4-bit layer dequantizes its whole weight and then calls `F.linear` (see
`modeling.base.hold_exact`). Here that is done once, with bitsandbytes' own dequantization and the same `F.linear`, so
results are the same to the bit; gradients too, where a base was loaded in the dtype that it computes in (elsewhere
bitsandbytes' backward pass rounds the weight once more). The 4-bit weights stay where they are, for saving and for
leaving.

Measured with SmolLM2-135M on AVX2 (417 MiB of fp32 weights, made in 0.3 s): dequantization is 5 % of a training step of
8 rows of 45 tokens, a third of one of 1 row, and four fifths of a decoding step of 8 rows.

bitsandbytes' product keeps its input, which only the gradient of a weight needs: a tensor for each layer, adapted or
not. It keeps it outside of autograd's view, so that gradient checkpointing does not free it either. Here the
product is bitsandbytes' own, and the backward pass computes what its backward pass computes.

    down_proj(act_fn(gate_proj(x)) * up_proj(x))

The product's backward pass needs the activation's result beside what the activation itself keeps. Here it is computed
again from the gate, by the same function: gradients are the same to the bit, and a tensor of the feed-forward's width
is not kept (of SmolLM2's activations a fifth).
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from torch import nn
from torch.nn import functional

from rankwise.compat.bitsandbytes import dequantized_8bit, repacks_on_cpu
from rankwise.experiment.module_names import layer_of
from rankwise.modeling.lora.packed import replaced_forward

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""At most this share of the memory that is free goes into dequantized weights."""
KEEP_BELOW = 512
"""Weights are kept for passes of fewer tokens.

SmolLM2-135M, 8 arms, two cores with AVX512, CPU seconds of a step of an arm without keeping against keeping: 0.402
against 0.388 with 616 tokens a pass, 0.444 against 0.414 with 308; the process's largest memory 320 MiB less.
"""
_CGROUP = Path("/sys/fs/cgroup")


class _Kept:
    """The forward of one 4-bit layer over a dequantized weight that stays."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._weight = _dequantize(layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = _bias(self._layer)
        return functional.linear(x.to(self._weight.dtype), self._weight, bias).to(x.dtype)


class _InPassing:
    """The forward of one 4-bit layer whose weight is dequantized for each product."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _DequantizedProduct.apply(x.to(self._layer.compute_dtype), self._layer)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)


class _DequantizedProduct(torch.autograd.Function):
    """`F.linear` over a weight that is there for the time of one product.

    The result's memory is allocated before the weight's: what is freed lies behind what stays then, and the allocator
    can use it for the next layer's result, whatever its size. The other way round every layer leaves a hole behind.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        rows, weight, bias = x.reshape(-1, x.shape[-1]), _dequantize(layer).t(), _bias(layer)
        if bias is None:
            torch.mm(rows, weight, out=y.view(-1, layer.out_features))
        else:
            torch.addmm(bias, rows, weight, out=y.view(-1, layer.out_features))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0]
        grad_x = grad.new_empty(*grad.shape[:-1], ctx.layer.in_features)
        rows = grad.reshape(-1, grad.shape[-1])
        torch.mm(rows, _dequantize(ctx.layer), out=grad_x.view(-1, ctx.layer.in_features))
        return grad_x, None


@contextmanager
def keep_dequantized(model: Any, *, memory_share: float = MEMORY_SHARE, tokens: int | None = None) -> Iterator[bool]:
    """Run a model's 4-bit layers over dequantized weights inside the block, where that helps and fits.

    Blocks may be nested: the outermost decides.

    Args:
        model: A model with or without 4-bit layers and adapters.
        memory_share: The largest share of the free memory to use.
        tokens: Tokens of a usual forward pass, where that is known: with `KEEP_BELOW` and more, keeping gains little.

    Yields:
        Whether weights are kept.
    """
    layers = _layers(model)
    if any(isinstance(layer.__dict__.get("forward"), _Kept | _InPassing) for layer in layers):
        yield is_dequantized(model)
        return
    needed = sum(map(_size, layers))
    free = free_memory()
    keep = _fits(needed, memory_share, tokens)
    if keep:
        logger.info("4-bit weights are kept dequantized: %d of %d MiB of free memory", needed >> 20, free >> 20)
    elif needed:
        many = tokens is not None and tokens >= KEEP_BELOW
        logger.info(
            "4-bit weights are dequantized in each pass: %s",
            f"keeping {needed >> 20} MiB gains little with {tokens} tokens a pass"
            if many
            else f"keeping them would take {needed >> 20} of {free >> 20} MiB of free memory",
        )
    for layer in layers:
        layer.forward = _Kept(layer) if keep else _InPassing(layer)
    try:
        yield keep
    finally:
        for layer in layers:
            del layer.forward


def is_dequantized(model: Any) -> bool:
    """Whether weights of a model are kept now."""
    return any(isinstance(module.__dict__.get("forward"), _Kept) for module in model.modules())


def dequantized_bytes(model: Any, *, memory_share: float = MEMORY_SHARE, tokens: int | None = None) -> int:
    """Bytes that `keep_dequantized` keeps, or would keep now; those of the largest layer where nothing is kept."""
    sizes = list(map(_size, _layers(model)))
    return sum(sizes) if is_dequantized(model) or _fits(sum(sizes), memory_share, tokens) else max(sizes, default=0)


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group where that has a limit."""
    free = int(psutil.virtual_memory().available)
    limit, used = _read_number(_CGROUP / "memory.max"), _read_number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _read_number(path: Path) -> int | None:
    """A number in a file of the kernel; None where there is no such file, or no limit (`max`)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _layers(model: Any) -> list[Any]:
    """The 4-bit layers whose weights are worth keeping; none if any of them has a kernel of its own."""
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    return layers if all(map(_helps, layers)) else []


def _helps(layer: Any) -> bool:
    """Whether bitsandbytes dequantizes for each product: on a CPU, where `exact_layers` holds the layer to it."""
    return (
        layer.weight.device.type == "cpu"
        and layer.weight.quant_state is not None
        and not repacks_on_cpu(layer)
        and layer.compute_dtype is not None
    )


def _fits(needed: int, memory_share: float, tokens: int | None) -> bool:
    """Whether weights of so many bytes are worth keeping, and find room."""
    return 0 < needed <= memory_share * free_memory() and (tokens is None or tokens < KEEP_BELOW)


def _dequantize(layer: Any) -> torch.Tensor:
    state = layer.weight.quant_state
    if state.dtype != layer.compute_dtype:
        # bitsandbytes' product rounds once, into the compute dtype, and not into the dtype that was quantized before.
        state = copy.copy(state)
        state.dtype = layer.compute_dtype
    weight: torch.Tensor = bnb.functional.dequantize_4bit(layer.weight.data, state)
    return weight


def _bias(layer: Any) -> torch.Tensor | None:
    return None if layer.bias is None else layer.bias.to(layer.compute_dtype)


def _size(layer: Any) -> int:
    return int(layer.in_features * layer.out_features * layer.compute_dtype.itemsize)


class _LeanEightBit:
    """The forward of one 8-bit layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _EightBitProduct.apply(x, self._layer)  # type: ignore[no-any-return, no-untyped-call]


class _EightBitProduct(torch.autograd.Function):
    """A layer's output; the backward pass needs the layer only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        y: torch.Tensor = type(layer).forward(layer, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0]
        weight = dequantized_8bit(ctx.layer, grad.dtype)
        product = grad.reshape(-1, grad.shape[-1]) @ weight
        return product.view(*grad.shape[:-1], weight.shape[1]), None


@contextmanager
def lean_8_bit_layers(model: Any) -> Iterator[int]:
    """Run a model's 8-bit layers this way inside the block.

    Yields:
        How many there are.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    with replaced_forward([(layer, _LeanEightBit(layer)) for layer in layers]):
        yield len(layers)


_PARTS = ("gate_proj", "up_proj", "down_proj")

Activation = Callable[[torch.Tensor], torch.Tensor]


class _LeanFeedForward:
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
        module.forward = _LeanFeedForward(module)
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
    return _same(module(x), _LeanFeedForward(module)(x))


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
