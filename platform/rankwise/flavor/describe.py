"""What a peft model in memory says of its base: where it came from and how it is quantized.

The model knows the path or hub id that it was loaded from, its quantization and its dtypes. It cannot prove that the
named source is what is in memory, so its tensors are compared with the files'.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.experiment.source import HubSource, parse_source
from rankwise.flavor.memory import check_same, commit_in_memory, load_dtype
from rankwise.flavor.metadata import BaseFacts
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.embeddings import plain_module
from rankwise.modeling.fingerprint import fingerprint_base
from rankwise.settings import Settings

BaseArgument = str | Path | ResolvedBase | LoadedBase | None


def facts_of(base: LoadedBase) -> BaseFacts:
    """The facts of a base that rankwise loaded."""
    return BaseFacts(
        source=base.source,
        revision=base.revision,
        fingerprint=base.fingerprint,
        quantization=base.quantization,
        compute_dtype=_name(base.compute_dtype),
        load_dtype=_name(load_dtype(base.model) or base.module_dtype),
        module_dtype=_name(base.module_dtype),
        device_type=base.device.type,
    )


def describe_base(
    model: Any, adapter_name: str, base: BaseArgument, base_revision: str | None, settings: Settings
) -> tuple[BaseFacts, Path]:
    """The facts of a model's base, and the local directory that it was compared with.

    Args:
        model: A `PeftModel`, or a transformers model with adapters.
        adapter_name: The adapter whose configuration may name the base.
        base: What the base is, where the model does not know or to say it better (`org/name` for a local copy).
        base_revision: Its commit or digest, where neither the model nor `base` knows.
        settings: Where the caches are.

    Raises:
        ConfigError: The source of the base is not known.
        AssetError: The base is not on this machine and cannot be fetched.
        BaseMismatchError: The named base is not the one in memory.
    """
    if isinstance(base, LoadedBase):
        return facts_of(base), base.path
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    resolved = (
        base if isinstance(base, ResolvedBase) else _resolve(plain, model, adapter_name, base, base_revision, settings)
    )
    check_same(plain, resolved.path, resolved.source)
    quantization, compute = quantization_of(plain)
    module = plain_module(plain.get_input_embeddings()).weight
    return (
        BaseFacts(
            source=resolved.source,
            revision=resolved.revision,
            fingerprint=fingerprint_base(resolved.path, settings),
            quantization=quantization,
            compute_dtype=_name(compute or module.dtype),
            load_dtype=_name(load_dtype(plain) or module.dtype),
            module_dtype=_name(module.dtype),
            device_type=module.device.type,
        ),
        resolved.path,
    )


def quantization_of(model: Any) -> tuple[QuantizationSpec, torch.dtype | None]:
    """How a transformers model is quantized, and what its 4-bit layers compute in (None without any).

    Raises:
        ConfigError: It is quantized by something else than bitsandbytes.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return QuantizationSpec(load_in_4bit=False), None
    return quantization_from(config if isinstance(config, dict) else config.to_dict())


def quantization_from(values: Mapping[str, Any]) -> tuple[QuantizationSpec, torch.dtype | None]:
    """The same out of the content of a `quantization_config`.

    Raises:
        ConfigError: It is of another library than bitsandbytes.
    """
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if "bitsandbytes" not in method and not method.startswith("bnb"):
        raise ConfigError(f"the base is quantized by {method}; the flavor records bitsandbytes' 4 and 8 bit, and none")
    if values.get("load_in_8bit"):
        return QuantizationSpec(load_in_4bit=False, load_in_8bit=True), None
    compute = getattr(torch, str(values.get("bnb_4bit_compute_dtype")).removeprefix("torch."))
    return (
        QuantizationSpec(
            bnb_4bit_quant_type=values["bnb_4bit_quant_type"],
            bnb_4bit_use_double_quant=values["bnb_4bit_use_double_quant"],
            bnb_4bit_compute_dtype=_name(compute),
        ),
        compute,
    )


def _resolve(
    plain: Any, model: Any, adapter_name: str, base: str | Path | None, revision: str | None, settings: Settings
) -> ResolvedBase:
    config = model.peft_config[adapter_name]
    named = base or config.base_model_name_or_path or plain.name_or_path
    if not named:
        raise ConfigError("the model does not know where its base came from; say it: base='org/name' or a directory")
    try:
        source = parse_source(str(named))
    except ValueError as error:
        raise ConfigError(f"base: {error}; say where the base came from: base='org/name' or a directory") from error
    if isinstance(source, HubSource):
        # The commit that is in memory, not the hub's newest one.
        revision = revision or config.revision or commit_in_memory(plain, source.repo)
    return resolve_base(str(named), revision, settings)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
