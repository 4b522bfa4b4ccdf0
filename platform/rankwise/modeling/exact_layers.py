"""Hold 4-bit layers to one arithmetic: the weight dequantized, then an ordinary matrix product.

On CPUs with AVX512-BF16, bitsandbytes 0.50 does something else in evaluation mode: at the first forward it repacks the
weight in place, rounds the scales of the quantization to bfloat16 for good (with double quantization they are quantized
anew when the weight is unpacked, so that what `state_dict` then gives is no longer what was loaded), and multiplies in
bfloat16 whatever the compute dtype is. The base would not be the one that its fingerprint names, an adapter would be
measured over another base than it was trained over, and the same model would answer otherwise on another CPU. So the
layers of every base that rankwise loads are told that there is no such kernel. `modeling.dequantized` gives back the
speed: it keeps the dequantized weights while they are in use.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb

REPACKED = (
    "bitsandbytes has repacked the 4-bit weights of this model for AVX512-BF16, which rounds their scales and computes "
    "in bfloat16: what is stored loads over the base as it is in its files, and answers a little otherwise than this "
    "model does now. rankwise.modeling.exact_layers.hold_exact(model), right after a base is loaded, prevents that"
)


def hold_exact(model: Any) -> int:
    """Keep the 4-bit layers of a model from being repacked; to be called before its first forward.

    Args:
        model: A model with or without 4-bit layers.

    Returns:
        How many 4-bit layers it has.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def is_repacked(model: Any) -> bool:
    """Whether bitsandbytes has repacked a weight of this model, so that it is no longer what was loaded."""
    return any(
        getattr(module.weight.quant_state, "packing_format_for_cpu", False)
        for module in model.modules()
        if isinstance(module, bnb.nn.Linear4bit)
    )
