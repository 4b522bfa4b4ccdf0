"""Whether a base is as it was loaded, checked between two packs: a warm one carries over what a pack left in it."""

from __future__ import annotations

import zlib
from typing import Any

import torch

_SAMPLED = 256
"""Bytes of each tensor that the digest looks at."""


def leftovers(model: Any) -> list[str]:
    """What a pack has left behind, in words; empty for a base in evaluation mode without adapters or gradients."""
    found = []
    adapters = sorted({name for module in model.modules() for name in getattr(module, "lora_A", ())})
    if adapters:
        found.append(f"adapters {', '.join(adapters)}")
    asking = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if asking:
        found.append(f"{len(asking)} parameters that ask for a gradient, the first is {asking[0]}")
    holding = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    if holding:
        found.append(f"{len(holding)} gradients, the first is that of {holding[0]}")
    if model.training:
        found.append("training mode")
    return found


@torch.no_grad()
def sample_digest(model: Any) -> int:
    """A checksum over a few bytes of every parameter that is not quantized.

    Quantized weights are left out: bitsandbytes packs them anew, in place, for some CPUs.
    """
    digest = 0
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or "lora_" in name:
            continue
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // (_SAMPLED // flat.element_size()))].contiguous()
        digest = zlib.crc32(some.cpu().view(torch.uint8).numpy().tobytes(), digest)
    return digest
