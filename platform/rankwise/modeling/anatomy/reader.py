"""Builds the anatomy of a stored or planned adapter."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankwise.assets.layout import TensorEntry, read_header
from rankwise.exceptions import AdapterIntegrityError, AssetError
from rankwise.experiment.schema import LoraSpec, QuantizationSpec
from rankwise.modeling.anatomy.anatomy import Anatomy, Memory, Target, elements, make_checks, measure_delta
from rankwise.modeling.estimate import Estimator

if TYPE_CHECKING:
    from rankwise.modeling.adapter import StoredAdapter

# A delta below this share of the median one has no noticeable effect.
_DEAD_SHARE = 0.01


def plan_anatomy(config: Any, lora: LoraSpec, quantization: QuantizationSpec) -> Anatomy:
    """The anatomy of a planned adapter, from the base's configuration (see `Estimator`).

    Raises:
        ConfigError: The architecture or a target module is unknown.
    """
    estimate = Estimator(config).arm(lora, quantization)
    scaling = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    return Anatomy(
        parameters=estimate.adapter_parameters,
        bytes=estimate.adapter_bytes_fp32,
        targets=tuple(
            Target(
                module=target.module,
                lora_A=target.lora_A,
                lora_B=target.lora_B,
                parameters=target.parameters,
                scaling=scaling,
                dropout=lora.lora_dropout,
            )
            for target in estimate.targets
        ),
        base=estimate.base,
        memory=Memory(
            base=estimate.base.bytes_loaded, base_and_adapter=estimate.memory_inference_bytes, measured=False
        ),
        checks=(),
    )


def adapter_anatomy(
    adapter: Path | StoredAdapter,
    *,
    base_config: Any = None,
    quantization: QuantizationSpec | None = None,
    module_dtype: str | None = None,
) -> Anatomy:
    """The anatomy of a stored adapter; memory is estimated.

    With `base_config` (see `Estimator`) it includes the base's size and compares shapes. `quantization` defaults to NF4
    with double quantization, `module_dtype` (of unquantized modules) to what this machine would load.

    Raises:
        AdapterIntegrityError: The directory is not a complete adapter.
        ConfigError: The base's architecture is unknown.
    """
    # Planned adapters do not need peft, which takes seconds to import.
    from rankwise.modeling.adapter import PREFIX, rank_of, read_adapter

    stored = read_adapter(adapter) if isinstance(adapter, Path) else adapter
    config, tensors = stored.config, stored.tensors
    # The checks compare the file's header with the tensors read from it.
    whole = _header(stored.weights)
    header = [entry for entry in whole if entry.name.removeprefix(PREFIX) not in stored.base_copies]
    estimator = Estimator(base_config) if base_config is not None else None
    targets = [
        _target(name, config, tensors, [entry for entry in header if entry.name.startswith(f"{PREFIX}{name}.")])
        for name in _modules(header, PREFIX)
    ]
    ordered = _flag_dead(_in_order(targets, estimator))
    size = sum(entry.stop - entry.start for entry in header)
    base = memory = None
    if estimator is not None:
        base = estimator.base(quantization or QuantizationSpec(), module_dtype=module_dtype)
        memory = Memory(base=base.bytes_loaded, base_and_adapter=base.bytes_loaded + size, measured=False)
    return Anatomy(
        parameters=stored.parameters,
        bytes=size,
        targets=ordered,
        base=base,
        memory=memory,
        checks=make_checks(
            stored.weights,
            whole,
            ordered,
            ranks={target.module: rank_of(config, target.module) for target in ordered},
            linear=estimator.with_head if estimator else None,
        ),
    )


def _target(name: str, config: Any, tensors: Mapping[str, torch.Tensor], stored: Sequence[TensorEntry]) -> Target:
    from rankwise.modeling.adapter import PREFIX, scaling_of

    lora_A, lora_B = (tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
    scaling = scaling_of(config, name, rank=int(lora_A.shape[0]))
    delta = measure_delta(lora_A, lora_B, scaling)
    flags = ("nonfinite",) if math.isnan(delta.norm) else () if lora_B.any() else ("untrained",)
    return Target(
        module=name,
        lora_A=(int(lora_A.shape[0]), int(lora_A.shape[1])),
        lora_B=(int(lora_B.shape[0]), int(lora_B.shape[1])),
        parameters=sum(elements(entry) for entry in stored),
        scaling=scaling,
        dropout=float(config.lora_dropout),
        delta_norm=delta.norm,
        effective_rank=delta.effective_rank,
        stable_rank=delta.stable_rank,
        rank_99=delta.rank_99,
        singular_values=delta.singular_values,
        flags=flags,
    )


def _header(path: Path) -> list[TensorEntry]:
    try:
        return read_header(path)
    except AssetError as error:
        raise AdapterIntegrityError(str(error)) from error


def _modules(header: Sequence[TensorEntry], prefix: str) -> list[str]:
    names = {entry.name for entry in header}
    modules = [
        name.removeprefix(prefix).removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")
    ]
    return sorted(name for name in modules if f"{prefix}{name}.lora_B.weight" in names)


def _in_order(targets: Sequence[Target], estimator: Estimator | None) -> list[Target]:
    order: Mapping[str, int] = {name: i for i, name in enumerate(estimator.linear)} if estimator else {}
    return sorted(targets, key=lambda target: (order.get(target.module, len(order)), _natural(target.module)))


def _natural(module: str) -> list[tuple[int, str]]:
    """Sort key that puts `layers.10` after `layers.9`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in module.split(".")]


def _flag_dead(targets: Sequence[Target]) -> tuple[Target, ...]:
    trained = [t.delta_norm for t in targets if t.delta_norm and not t.flags]
    threshold = _DEAD_SHARE * statistics.median(trained) if trained else 0.0
    return tuple(
        replace(target, flags=("dead",))
        if not target.flags and target.delta_norm is not None and target.delta_norm <= threshold
        else target
        for target in targets
    )
