"""What an adapter is made of: shapes, parameters, bytes, deltas, and whether they agree with each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.weights import TensorEntry, read_header
from rankwise.exceptions import AdapterIntegrityError, AssetError
from rankwise.experiment.schema import LoraSpec, QuantizationSpec
from rankwise.modeling.delta import measure_delta
from rankwise.modeling.estimate import BaseEstimate, Estimator, layer_sums

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
# A trained module whose delta is so much smaller than the median one changes nothing that can be noticed.
_DEAD_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Target:
    """One adapted linear layer.

    Attributes:
        module: Its full name in the base.
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        parameters: Elements of all tensors that the adapter stores for it.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.
        dropout: lora_dropout.
        delta_norm: Frobenius norm of scaling * B A; None in a plan without weights.
        effective_rank: Roy and Vetterli's; None as above.
        stable_rank: Squared norm over the squared largest singular value; None as above.
        rank_99: The smallest rank with 99 % of the squared norm; None as above.
        flags: `untrained` (B is zero), `dead` (its delta is zero or below 1 % of the median), `nonfinite`.
    """

    module: str
    lora_A: tuple[int, int]
    lora_B: tuple[int, int]
    parameters: int
    scaling: float
    dropout: float
    delta_norm: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    rank_99: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """Two numbers that must agree."""

    name: str
    expected: int
    actual: int

    @property
    def ok(self) -> bool:
        """Whether they do."""
        return self.expected == self.actual


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the base, and of base and adapter; measured on loaded models, or estimated for this machine."""

    base: int
    base_and_adapter: int
    measured: bool


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """An adapter, taken apart.

    Attributes:
        parameters: Elements of all tensors.
        bytes: Of all tensors; the file has a header on top.
        targets: In the order of the base's modules where it is known, else of the names.
        base: The base's size; None where its configuration is not known.
        memory: None as above.
        checks: What must agree.
    """

    parameters: int
    bytes: int
    targets: tuple[Target, ...]
    base: BaseEstimate | None
    memory: Memory | None
    checks: tuple[Check, ...]

    @property
    def layers(self) -> dict[int | None, int]:
        """Parameters of each layer; None collects what is outside of layers."""
        return layer_sums((target.module, target.parameters) for target in self.targets)

    @property
    def share_of_base(self) -> float | None:
        """The adapter's parameters over the base's."""
        return self.parameters / self.base.parameters if self.base else None

    def to_dict(self) -> dict[str, Any]:
        """The form of `inspect --json`. A number that is not finite is null: JSON has none."""
        return {
            "adapter": {
                "parameters": self.parameters,
                "bytes": self.bytes,
                "share_of_base": self.share_of_base,
                "layers": [{"layer": layer, "parameters": count} for layer, count in self.layers.items()],
                "targets": [_target_dict(target) for target in self.targets],
            },
            "base": {
                name: getattr(self.base, name) for name in ("parameters", "bytes_fp32", "bytes_bf16", "bytes_quantized")
            }
            if self.base
            else None,
            "memory": asdict(self.memory) if self.memory else None,
            "checks": [{**asdict(check), "ok": check.ok} for check in self.checks],
        }


def plan_anatomy(
    config: Any, lora: LoraSpec, quantization: QuantizationSpec, *, module_dtype: str | None = None
) -> Anatomy:
    """The anatomy of an adapter that does not exist yet, from the base's configuration.

    Args:
        config: See `Estimator`.
        lora: Rank, alpha, dropout, target modules.
        quantization: Of the base.
        module_dtype: Of the modules that are not quantized; what this machine would load when left out.

    Raises:
        ConfigError: The architecture or a target module is not known.
    """
    estimate = Estimator(config).arm(lora, quantization, module_dtype=module_dtype)
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
    directory: Path,
    *,
    base_config: Any = None,
    quantization: QuantizationSpec | None = None,
    module_dtype: str | None = None,
    measured: tuple[int, int] | None = None,
) -> Anatomy:
    """The anatomy of a stored adapter.

    Args:
        directory: A PEFT directory; its manifest is checked if it has one.
        base_config: The base's configuration (see `Estimator`), for its size and to compare shapes.
        quantization: Of the base; NF4 with double quantization when left out.
        module_dtype: Of the base's modules that are not quantized; what this machine would load when left out.
        measured: Bytes of a loaded base, and of it with this adapter.

    Raises:
        AdapterIntegrityError: The directory is no whole adapter.
        ConfigError: The architecture of the base is not known.
    """
    # peft is needed for stored adapters only, and takes seconds to import.
    from rankwise.modeling.adapter import PREFIX, WEIGHTS_NAME, read_adapter
    from rankwise.modeling.scaling import rank_of, scaling_of

    config, tensors = read_adapter(directory)
    header = _header(directory / WEIGHTS_NAME)
    estimator = Estimator(base_config) if base_config is not None else None
    targets = []
    for name in _modules(header, PREFIX):
        lora_A, lora_B = (tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        scaling = scaling_of(config, name, rank=int(lora_A.shape[0]))
        delta = measure_delta(lora_A, lora_B, scaling)
        flags = []
        if math.isnan(delta.norm):
            flags.append("nonfinite")
        elif not lora_B.any():
            flags.append("untrained")
        targets.append(
            Target(
                module=name,
                lora_A=(int(lora_A.shape[0]), int(lora_A.shape[1])),
                lora_B=(int(lora_B.shape[0]), int(lora_B.shape[1])),
                parameters=sum(_elements(e) for e in header if e.name.startswith(f"{PREFIX}{name}.")),
                scaling=scaling,
                dropout=float(config.lora_dropout),
                delta_norm=delta.norm,
                effective_rank=delta.effective_rank,
                stable_rank=delta.stable_rank,
                rank_99=delta.rank_99,
                flags=tuple(flags),
            )
        )
    ordered = _flag_dead(_in_order(targets, estimator))
    parameters = sum(_elements(entry) for entry in header)
    base = memory = None
    if estimator is not None:
        base = estimator.base(quantization or QuantizationSpec(), module_dtype=module_dtype)
        size = sum(entry.stop - entry.start for entry in header)
        memory = (
            Memory(base=measured[0], base_and_adapter=measured[1], measured=True)
            if measured
            else Memory(base=base.bytes_loaded, base_and_adapter=base.bytes_loaded + size, measured=False)
        )
    return Anatomy(
        parameters=parameters,
        bytes=sum(entry.stop - entry.start for entry in header),
        targets=ordered,
        base=base,
        memory=memory,
        checks=_checks(
            directory / WEIGHTS_NAME, header, ordered, estimator, {t.module: rank_of(config, t.module) for t in ordered}
        ),
    )


def _checks(
    path: Path,
    header: Sequence[TensorEntry],
    targets: Sequence[Target],
    estimator: Estimator | None,
    ranks: Mapping[str, int],
) -> tuple[Check, ...]:
    """Formula = header = file, and the shapes of the base's layers; `ranks` are those that the configuration says."""
    parameters = sum(_elements(entry) for entry in header)
    formula = sum(ranks[target.module] * (target.lora_A[1] + target.lora_B[0]) for target in targets)
    # Rows of new tokens, magnitudes of DoRA: stored beside the factors, outside of the formula.
    formula += sum(
        _elements(entry) for entry in header if not entry.name.endswith((".lora_A.weight", ".lora_B.weight"))
    )
    checks = [
        Check(name="parameters: r * (in + out) = tensors in the header", expected=formula, actual=parameters),
        Check(
            name="bytes: elements * size of their dtype = tensors in the header",
            expected=sum(_elements(entry) * _BYTES.get(entry.dtype, 0) for entry in header),
            actual=sum(entry.stop - entry.start for entry in header),
        ),
        Check(
            name="bytes: header and tensors = file",
            expected=max((entry.stop for entry in header), default=0),
            actual=path.stat().st_size,
        ),
        Check(
            name="ranks: rows of lora_A = columns of lora_B",
            expected=sum(target.lora_A[0] for target in targets),
            actual=sum(target.lora_B[1] for target in targets),
        ),
    ]
    if estimator is not None:
        fitting = [
            target for target in targets if estimator.linear.get(target.module) == (target.lora_A[1], target.lora_B[0])
        ]
        checks.append(
            Check(
                name="targets: linear layers of the base with these shapes", expected=len(targets), actual=len(fitting)
            )
        )
    return tuple(checks)


def _header(path: Path) -> list[TensorEntry]:
    try:
        return read_header(path)
    except AssetError as error:
        raise AdapterIntegrityError(str(error)) from error


def _elements(entry: TensorEntry) -> int:
    return math.prod(entry.shape)


def _modules(header: Sequence[TensorEntry], prefix: str) -> list[str]:
    """Names of the modules that have both factors, as the base names them."""
    names = {entry.name for entry in header}
    found = [
        name.removeprefix(prefix).removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")
    ]
    return sorted(name for name in found if f"{prefix}{name}.lora_B.weight" in names)


def _in_order(targets: Sequence[Target], estimator: Estimator | None) -> list[Target]:
    order: Mapping[str, int] = {name: i for i, name in enumerate(estimator.linear)} if estimator else {}
    return sorted(targets, key=lambda target: (order.get(target.module, len(order)), _natural(target.module)))


def _natural(module: str) -> list[tuple[int, str]]:
    """`layers.10` after `layers.9`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in module.split(".")]


def _flag_dead(targets: Sequence[Target]) -> tuple[Target, ...]:
    trained = [t.delta_norm for t in targets if t.delta_norm and not t.flags]
    threshold = _DEAD_SHARE * statistics.median(trained) if trained else 0.0
    return tuple(
        Target(**{**_fields(target), "flags": ("dead",)})
        if not target.flags and target.delta_norm is not None and target.delta_norm <= threshold
        else target
        for target in targets
    )


def _fields(target: Target) -> dict[str, Any]:
    return {name: getattr(target, name) for name in target.__dataclass_fields__}


def _target_dict(target: Target) -> dict[str, Any]:
    values = asdict(target)
    values["lora_A"], values["lora_B"], values["flags"] = list(target.lora_A), list(target.lora_B), list(target.flags)
    if target.delta_norm is not None and not math.isfinite(target.delta_norm):
        values["delta_norm"] = None
    return values
