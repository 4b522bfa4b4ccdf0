"""A CUDA GPU that there is not: tensors that say they are on `cuda:0`, with their numbers in the CPU's memory.

    with pretend_gpu():
        model = to_gpu(model)
        train(model)

What runs on them is computed by the CPU's kernels, and is refused as on a GPU where one tensor of an operation is there
and another is not. So a program's branches for CUDA run, with true numbers, and a tensor that was left behind is found.
What it cannot show: CUDA's own kernels, their rounding and order, streams, and memory.

A `PretendTensor` is a meta tensor to C++ (torch without CUDA has no guard for its devices) and a CUDA tensor to Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
# What may have an operand on each side: copies, and tensors that are indexed by numbers of the CPU.
_READS = {"tolist", "item", "__bool__", "__float__", "__int__", "__index__"}
_CROSSING = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::index_put"}


class PretendTensor(torch.Tensor):
    """A tensor on the pretended GPU; `held` has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device="meta",
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        strangers = [each for each in tensors if not isinstance(each, PretendTensor) and each.dim() > 0]
        if strangers and func._schema.name not in _CROSSING:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and "
                f"{strangers[0].device}: {func._schema.name}"
            )
        target = kwargs.pop("device", None)
        if func._schema.name == "aten::copy_" and not isinstance(args[0], PretendTensor):
            _transfer("to the CPU")
            return args[0].copy_(_held(args[1]))
        if _watchers:
            _watchers[-1][0](func, args)
            if func._schema.name == "aten::copy_" and not isinstance(args[1], PretendTensor):
                _transfer("to the GPU")
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if target is not None and torch.device(target).type == "cpu":
            return out
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrapped, out))


class _Pinned(torch.Tensor):
    """A tensor in pinned memory, from which copies to the GPU do not make the CPU wait."""


_watchers: list[tuple[Callable[[Any, Any], None], Callable[[str], None]]] = []


@contextmanager
def watched(operation: Callable[[Any, Any], None], transfer: Callable[[str], None]) -> Iterator[None]:
    """Report to functions inside the block.

    Args:
        operation: Called with each dispatched operator and its arguments.
        transfer: Called with the direction of each copy, or read of a value, that makes the CPU wait.
    """
    _watchers.append((operation, transfer))
    try:
        yield
    finally:
        _watchers.pop()


def _transfer(direction: str) -> None:
    if _watchers:
        _watchers[-1][1](direction)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _wrapped(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor)
    return PretendTensor(value) if plain else value


def _is_gpu(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type in {"cuda", "meta"}  # what C++ takes for a tensor's device
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


class _Mode(TorchFunctionMode):
    """Makes tensors where `device` says the GPU, and moves tensors there and back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        own = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "cuda" and own is not None:
            return _moved(own, "cuda")
        if name in _READS and isinstance(own, PretendTensor):
            _transfer(f"read by {name}")
            return func(own.held, *args[1:], **kwargs)
        if name in {"cpu", "numpy"} and isinstance(own, PretendTensor):
            return _moved(own, "cpu") if name == "cpu" else func(own.held, *args[1:], **kwargs)
        if name == "pin_memory" and own is not None:
            return _Pinned(own.detach().clone())
        if name == "to" and own is not None:
            device = kwargs.pop("device", None)
            if kwargs.pop("non_blocking", False) and isinstance(own, _Pinned):
                return PretendTensor(own.as_subclass(torch.Tensor).clone())
            rest = list(args[1:])
            if rest and isinstance(rest[0], torch.Tensor):
                device, rest[0] = rest[0].device, rest[0].dtype
            elif rest and not isinstance(rest[0], torch.dtype):
                device = rest.pop(0)
            moved = own if device is None else _moved(own, device)
            if rest and rest[0] is None:
                rest = [moved.dtype, *rest[1:]]
            return func(moved, *rest, **kwargs) if (rest and isinstance(rest[0], torch.dtype)) or kwargs else moved
        if name == "backward" and own is not None:
            # A mode is off inside of its own method, and backward passes make tensors too.
            ones = torch.ones_like(own)
            with self:
                return torch.autograd.graph._engine_run_backward(
                    (own,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if func == torch.Tensor.data.__set__ and isinstance(own, PretendTensor):  # type: ignore[attr-defined]
            own.held = args[1].held
        if name == "__setitem__" and isinstance(own, PretendTensor):
            # C++ would make a tensor of a number where it thinks that this one is.
            own.held[tree_map(_held, args[1])] = _held(args[2])
            return None
        if name == "scaled_dot_product_attention" and isinstance(own, PretendTensor):
            return _attention(*args, **kwargs)
        if _is_gpu(kwargs.get("device")):
            out = func(*tree_map(_held, args), **{**tree_map(_held, kwargs), "device": "cpu"})
            return tree_map(_wrapped, out)
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The CPU's fused kernel; torch chooses by the device that C++ sees."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(groups, dim=-3) for each in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    made: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return made


def _moved(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """The tensor itself where it is there already, with autograd's own copy otherwise."""
    there = _is_gpu(device) or isinstance(device, int)
    if there == isinstance(tensor, PretendTensor):
        return tensor
    _transfer("to the GPU" if there else "to the CPU")
    return _Move.apply(tensor)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.held.clone() if isinstance(tensor, PretendTensor) else PretendTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return _Move.apply(grads[0])


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Let `cuda` mean the pretended GPU inside the block, in this thread."""
    generator = torch.Generator

    def functions(**values: Any) -> list[Any]:
        return [mock.patch.object(torch.cuda, name, value) for name, value in values.items()]

    patches = [
        mock.patch.object(torch, "Generator", side_effect=lambda device="cpu": generator()),
        *functions(
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            get_device_capability=lambda device=None: (9, 0),
            mem_get_info=lambda device=None: (64 << 30, 80 << 30),
            memory_reserved=lambda device=None: 2 << 30,
            memory_allocated=lambda device=None: 1 << 30,
            max_memory_allocated=lambda device=None: 3 << 30,
            reset_peak_memory_stats=lambda device=None: None,
            empty_cache=lambda: None,
            synchronize=lambda device=None: None,
        ),
    ]
    for each in patches:
        each.start()
    try:
        with _Mode():
            yield
    finally:
        for each in reversed(patches):
            each.stop()


def to_gpu(model: Any) -> Any:
    """Move a model there, in place; bitsandbytes' quantized layers too."""
    for module in list(model.modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            _move_4_bit(module)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            _move_8_bit(module)
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tied = memo.setdefault(
                    id(parameter), nn.Parameter(PretendTensor(parameter.data), parameter.requires_grad)
                )
                module._parameters[name] = tied
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = PretendTensor(buffer)
    return model


def _move_4_bit(layer: Any) -> None:
    weight = layer._parameters.pop("weight")
    state = weight.quant_state
    for owner in (state, state.state2):
        for name in ("absmax", "code", "offset"):
            if isinstance(value := getattr(owner, name, None), torch.Tensor):
                setattr(owner, name, _wrapped(value))
    moved = PretendTensor(weight.data)
    for name in ("quant_state", "quant_type", "compress_statistics"):
        setattr(moved, name, getattr(weight, name))
    # No parameter: bitsandbytes' class for it cannot hold a tensor of another class.
    layer.__dict__["weight"] = moved


def _move_8_bit(layer: Any) -> None:
    weight = layer._parameters.pop("weight")
    codes, scales = (weight.CB, weight.SCB) if layer.state.CB is None else (layer.state.CB, layer.state.SCB)
    layer.state.CB, layer.state.SCB = _wrapped(codes.data), _wrapped(scales.data)
    moved = PretendTensor(codes.data)
    moved.CB, moved.SCB, moved.has_fp16_weights = None, None, False
    layer.__dict__["weight"] = moved
