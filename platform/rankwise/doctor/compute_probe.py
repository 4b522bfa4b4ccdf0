"""Probe program: prints what torch and bitsandbytes can do on this machine, as one line of JSON."""

from __future__ import annotations

import json
import time
from typing import Any

import bitsandbytes as bnb
import torch

from rankwise.compat.bitsandbytes import native_library
from rankwise.modeling.base import default_device, resolve_dtype

_BLOCK = 64
_FLAGS = ("avx512_bf16", "amx_bf16")


def facts() -> dict[str, Any]:
    """The JSON document of this probe."""
    device = default_device()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    devices = []
    for index in cuda:
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    capabilities = torch.cpu.get_capabilities()
    return {
        "torch": torch.__version__,
        "built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs",
        "devices": ", ".join(devices),
        "device": device.type,
        "dtype": resolve_dtype(device).reason,
        "fast_bfloat16": [flag for flag in _FLAGS if capabilities.get(flag)],
        "kernels": {name: kernels(torch.device(name)) for name in ("cpu", *(f"cuda:{index}" for index in cuda))},
    }


def kernels(device: torch.device) -> dict[str, Any]:
    """Compare an NF4 round trip with NF4's definition; `difference` is relative to the block's maximum."""
    result = {"version": bnb.__version__, "library": native_library(), "seconds": 0.0, "difference": 0.0, "error": ""}
    weight = torch.randn(256, _BLOCK, generator=torch.Generator().manual_seed(0)).to(device)
    began = time.perf_counter()
    try:
        quantized, state = bnb.functional.quantize_4bit(weight, blocksize=_BLOCK, quant_type="nf4")
        back = bnb.functional.dequantize_4bit(quantized, state)
        maximum = weight.abs().amax(dim=1, keepdim=True)
        # [256, 64, 16] distances to the 16 values; halfway between two values, either is correct.
        distance = (weight / maximum).unsqueeze(-1).sub(state.code.to(device)).abs()
        result["difference"] = ((weight - back).abs() / maximum - distance.amin(dim=-1)).abs().max().item()
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    result["seconds"] = time.perf_counter() - began
    return result


if __name__ == "__main__":
    print(json.dumps(facts()))
