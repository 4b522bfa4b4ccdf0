"""Bases whose files are quantized already (`*-bnb-4bit`): loaded as they are.

Their weights part of the fingerprint is a hash of the quantized bytes, so a 4-bit checkpoint and the full-precision
model that it was made from are different bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec

_SETTINGS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def quantization_from(values: Mapping[str, Any]) -> tuple[QuantizationSpec, torch.dtype | None]:
    """A quantization from the content of a `quantization_config`, and what 4-bit layers compute in (None without any).

    Raises:
        ConfigError: It is of another library than bitsandbytes.
    """
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if "bitsandbytes" not in method and not method.startswith("bnb"):
        raise ConfigError(f"the base is quantized by {method}; the flavor records bitsandbytes' 4 and 8 bit, and none")
    if values.get("load_in_8bit"):
        return QuantizationSpec(load_in_4bit=False, load_in_8bit=True), None
    compute: torch.dtype = getattr(torch, str(values.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch."))
    name: Any = str(compute).removeprefix("torch.")
    return (
        QuantizationSpec(
            bnb_4bit_quant_type=values.get("bnb_4bit_quant_type", "fp4"),
            bnb_4bit_use_double_quant=bool(values.get("bnb_4bit_use_double_quant", False)),
            bnb_4bit_compute_dtype=name,
        ),
        compute,
    )


def stored_quantization(config: Mapping[str, Any]) -> QuantizationSpec | None:
    """How a base's files are quantized, from its `config.json`; None if they are not. The compute dtype is `auto`.

    Raises:
        ConfigError: Another library than bitsandbytes quantized them.
    """
    values = config.get("quantization_config")
    if not values:
        return None
    spec, _ = quantization_from(values)
    return spec.model_copy(update={"bnb_4bit_compute_dtype": "auto"})


def check_stored_quantization(config: Mapping[str, Any], requested: QuantizationSpec, source: str) -> bool:
    """Check that a requested quantization is that of a base's files; return whether those are quantized.

    Raises:
        ConfigError: They are quantized in another way. The message has the settings to use.
    """
    try:
        stored = stored_quantization(config)
    except ConfigError as error:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"base {source} is already quantized (method {method}); rankwise loads full precision, and bitsandbytes' "
            "4 and 8 bit: use the full-precision base, or a checkpoint in one of these"
        ) from error
    if stored is None:
        return False
    if stored.effective() != requested.effective():
        settings = ", ".join(
            f"{name}: {str(getattr(stored, name)).lower()}"
            for name in _SETTINGS
            if getattr(stored, name) != getattr(QuantizationSpec(), name)
        )
        raise ConfigError(
            f"the files of base {source} are in {_words(stored)}, and are loaded as they are; quantization requests "
            f"{_words(requested)}. "
            + (f"Set quantization: {{{settings}}}" if settings else "Leave quantization out")
            + ", or use the full-precision base"
        )
    return True


def _words(spec: QuantizationSpec) -> str:
    if spec.bits == 4:
        double = "with" if spec.bnb_4bit_use_double_quant else "without"
        return f"4 bit {spec.bnb_4bit_quant_type} {double} double quantization"
    return "8 bit" if spec.bits == 8 else "no quantization"
