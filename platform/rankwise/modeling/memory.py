"""Memory of a model: what it takes as it is loaded, and what it would take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# bitsandbytes: one scaling factor for so many weights, one of the second level for so many of the first.
BLOCK = 64
NESTED_BLOCK = 256
_CODE_BYTES = 16 * 4
_NESTED_CODE_BYTES = 256 * 4 + 4  # The table of 8-bit values and the offset.


def model_bytes(model: Any) -> int:
    """Bytes of all parameters, buffers and quantization states; what is shared is counted once."""
    seen: dict[tuple[str, int], int] = {}
    for tensor in _tensors(model):
        if tensor.numel():
            seen[str(tensor.device), tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def quantized_linear_bytes(weights: int, *, bits: int, double_quant: bool, out_features: int) -> int:
    """Bytes of one linear layer's weight as bitsandbytes keeps it.

    Args:
        weights: in_features * out_features.
        bits: 4 (NF4 or FP4, in blocks of 64) or 8 (LLM.int8, one float32 for each output).
        double_quant: Whether the scaling factors of the blocks are quantized to 8 bit themselves (4 bit only).
        out_features: Outputs of the layer.
    """
    if bits == 8:
        return weights + 4 * out_features
    blocks = -(-weights // BLOCK)
    packed = -(-weights // 2)
    if not double_quant:
        return packed + 4 * blocks + _CODE_BYTES
    return packed + blocks + 4 * -(-blocks // NESTED_BLOCK) + _CODE_BYTES + _NESTED_CODE_BYTES


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter.data
        state = getattr(parameter, "quant_state", None)
        for owner in (state, getattr(state, "state2", None)):
            for name in ("absmax", "code", "offset"):
                value = getattr(owner, name, None)
                if isinstance(value, torch.Tensor):
                    yield value
        if isinstance(scale := getattr(parameter, "SCB", None), torch.Tensor):
            yield scale
    yield from model.buffers()
