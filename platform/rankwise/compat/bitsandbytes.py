"""Private names of bitsandbytes, and its import without compilation. Checked with bitsandbytes 0.50.2."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from rankwise.compat.torch import compilation_refused

# On CPUs with AVX512-BF16, bitsandbytes logs at its import that a kernel from the hub is missing. No base of rankwise
# uses that kernel (see `disable_cpu_repacking`).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# bitsandbytes passes some plain functions to torch's compiler, and keeps them as they are where that fails. Importing
# the compiler costs every process 41 MiB and 1.3 s of CPU time, and what it makes of quantization depends on whether
# the machine has a C++ compiler. The results were equal bit for bit. There is no setting for it.
with compilation_refused():
    from bitsandbytes.cextension import lib


def native_library() -> str:
    """The class of the loaded native library, such as `CudaBNBNativeLibrary`; a mock where none could be loaded.

    No public function says which library was loaded.
    """
    return type(lib).__name__


def disable_cpu_repacking(layer: Any) -> None:
    """Keep a `Linear4bit` from repacking its weight in evaluation mode on CPUs with AVX512-BF16.

    The attribute is the only switch: repacking rounds the scales and ignores the compute dtype.
    """
    layer.support_avx512bf16_for_cpu = False


def set_dtypes(model: Any, compute: torch.dtype, dequantized: torch.dtype) -> None:
    """Set what all `Linear4bit` of a model compute in and are dequantized to, whatever their checkpoint has.

    `compute_type_is_set` keeps the first forward from choosing the former by its input.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = compute, True
            module.weight.quant_state.dtype = dequantized


def repacks_on_cpu(layer: Any) -> bool:
    """Whether a `Linear4bit` may repack its weight in evaluation mode on this CPU."""
    return bool(layer.support_avx512bf16_for_cpu)


def is_repacked(layer: Any) -> bool:
    """Whether a `Linear4bit` has repacked its weight.

    Only its quantization state knows, which has the attribute from the first time on.
    """
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def quantization_tensors(parameter: Any) -> Iterator[torch.Tensor]:
    """The tensors that a quantized parameter has beside its own data; none for other parameters.

    4 bit: scales, table of values and offset, of both levels with double quantization. 8 bit: scales. They are neither
    parameters nor buffers of a module, so no public iterator yields them.
    """
    state = getattr(parameter, "quant_state", None)
    for owner in (state, getattr(state, "state2", None)):
        for name in ("absmax", "code", "offset"):
            value = getattr(owner, name, None)
            if isinstance(value, torch.Tensor):
                yield value
    if isinstance(scale := getattr(parameter, "SCB", None), torch.Tensor):
        yield scale


def dequantized_8bit(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a `Linear8bitLt`, (out_features, in_features), computed as its own backward pass computes it.

    The layer has no method for it; after its first forward `state` holds the 8-bit weight and its scales.
    """
    state = layer.state
    weight: torch.Tensor = state.CB.to(dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))
    return weight


class _Once(logging.Filter):
    """Lets one message through once per process."""

    def __init__(self, message: str) -> None:
        """Watch for `message`, as it is before its arguments are filled in."""
        super().__init__()
        self._message, self._seen = message, False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record."""
        if record.msg != self._message:
            return True
        seen, self._seen = self._seen, True
        return not seen


_once = _Once("MatMul8bitLt: inputs will be cast from %s to float16 during quantization")


def log_casts_once() -> None:
    """Log once per process that 8-bit layers cast their input to float16.

    bitsandbytes logs it in every forward of every 8-bit layer and has no setting for it.
    """
    # Adding the same filter again has no effect.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_once)
