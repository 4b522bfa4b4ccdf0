"""Which dtype a base computes in on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwise.settings import compute_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ResolvedDtype:
    """A dtype and the reason for it, in words for the log."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """The dtype's name as YAML files and transformers spell it: `float32`, `bfloat16`, `float16`."""
        return str(self.dtype).removeprefix("torch.")


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(device: torch.device, requested: str = "auto") -> ResolvedDtype:
    """Decide on the compute dtype.

    Args:
        device: Where the base will run.
        requested: `auto`, or one of the names in `DTYPES`.

    Raises:
        ConfigError: `RANKWISE_COMPUTE_DTYPE` names a dtype that there is not.
    """
    if requested != "auto":
        return ResolvedDtype(dtype=DTYPES[requested], reason=f"{requested}: as asked for")
    set_here = compute_dtype()
    if set_here != "auto":
        return ResolvedDtype(dtype=DTYPES[set_here], reason=f"{set_here}: RANKWISE_COMPUTE_DTYPE says so")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        version = f"CUDA capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return ResolvedDtype(dtype=torch.bfloat16, reason=f"bfloat16: {version}")
        # Small gradients would be zero in float16.
        reason = f"float32: {version} has no bfloat16; float16 would need loss scaling"
        return ResolvedDtype(dtype=torch.float32, reason=reason)
    if device.type == "cpu":
        fast = _fast_bfloat16_on_cpu()
        if fast is not None:
            return ResolvedDtype(dtype=torch.bfloat16, reason=f"bfloat16: the CPU has {fast}")
        return ResolvedDtype(
            dtype=torch.float32,
            reason="float32: the CPU has neither AVX512-BF16 nor AMX, where bfloat16 is several times slower",
        )
    return ResolvedDtype(dtype=torch.float32, reason=f"float32: nothing is known of devices of type {device.type}")


def _fast_bfloat16_on_cpu() -> str | None:
    capabilities = torch.cpu.get_capabilities()
    for flag, name in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16")):
        if capabilities.get(flag):
            return name
    return None
