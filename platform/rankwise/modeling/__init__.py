"""The quantized base, its fingerprint, adapters over it, their anatomy."""

import logging
from typing import Any

import torch

# On CPUs with AVX512-BF16, bitsandbytes says at its import that a kernel from the hub is missing, which no base of
# rankwise would use; see `exact_layers`.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without having it compile what it has no kernel for.

    It asks torch's compiler for some of its plain functions and takes them as they are where that fails. The compiler's
    import alone costs every process 41 MiB and 1.3 s of CPU time; and what it makes of quantization depends on whether
    there is a C++ compiler on the machine. The results were the same to the bit.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("bitsandbytes' functions are not compiled")

    compiler, torch.compile = torch.compile, refuse
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler


_import_bitsandbytes()
