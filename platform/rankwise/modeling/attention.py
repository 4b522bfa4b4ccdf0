"""Which attention implementation a base runs, and why.

`auto` takes the fastest that the architecture supports:

| implementation | chosen by `auto` |
|---|---|
| `sdpa` | where the architecture supports it: without a mask it runs PyTorch's own flash attention |
| `flash_attention_2` | otherwise, on a GPU in 16 bit, with the package flash_attn installed |
| `eager` | otherwise: every architecture has it; architectures without attention (Mamba) run under this name too |
| `flex_attention` | never: it is compiled anew for each shape of a batch |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import is_flash_attn_2_available

from rankwise.compat.transformers import supported_attention
from rankwise.exceptions import ConfigError

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class ResolvedAttention:
    """An attention implementation and the reason for choosing it, for the log."""

    name: str
    reason: str


def resolve_attention(
    model_class: type, device: torch.device, dtype: torch.dtype, requested: str = "auto"
) -> ResolvedAttention:
    """Choose the attention of a model class on a device, for modules of `dtype`.

    Raises:
        ConfigError: The requested one is not supported by the architecture, or cannot run here.
    """
    supported = supported_attention(model_class)
    if requested != "auto":
        check_attention(model_class, requested)
        if problem := _obstacle(requested, device, dtype):
            raise ConfigError(f"attn_implementation: {requested} {problem}; use auto")
        return ResolvedAttention(name=requested, reason=f"{requested}: as requested")
    name = model_class.__name__
    if "sdpa" in supported:
        return ResolvedAttention(name="sdpa", reason=f"sdpa: the fastest that {name} supports")
    if "flash_attention_2" in supported:
        problem = _obstacle("flash_attention_2", device, dtype)
        if problem is None:
            reason = f"flash_attention_2: {name} does not support sdpa"
            return ResolvedAttention(name="flash_attention_2", reason=reason)
        return ResolvedAttention(
            name="eager", reason=f"eager: {name} does not support sdpa, and flash_attention_2 {problem}"
        )
    return ResolvedAttention(name="eager", reason=f"eager: {name} supports no other")


def check_attention(model_class: type, requested: str) -> None:
    """Check that an architecture supports the requested attention, on whatever device.

    Raises:
        ConfigError: It does not.
    """
    supported = supported_attention(model_class)
    if requested != "auto" and requested not in supported:
        raise ConfigError(
            f"attn_implementation: {model_class.__name__} does not support {requested}; it supports "
            f"{', '.join(supported)}, and auto chooses the fastest of them"
        )


def runs_here(model_class: type, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an attention implementation that was used elsewhere can run on this device."""
    return name in supported_attention(model_class) and _obstacle(name, device, dtype) is None


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run on this machine, in words that follow its name; None if it can."""
    if name == "flash_attention_2":
        if device.type != "cuda":
            return f"needs a CUDA GPU, and the base is on {device.type}"
        if dtype not in _SIXTEEN_BIT:
            return f"computes in 16 bit only, and the base computes in {str(dtype).removeprefix('torch.')}"
        if not is_flash_attn_2_available():
            return "needs the package flash_attn, which is not installed or does not support this GPU"
    if name == "flex_attention" and device.type != "cuda":
        return f"has a backward pass on CUDA GPUs only, and the base is on {device.type}"
    return None
