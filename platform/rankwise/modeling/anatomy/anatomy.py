"""What an adapter consists of: targets, used rank, norms of its deltas, consistency checks, groups of alike layers.

`anatomy.reader` fills these values in; the anatomy page and the command line show them.

Shapes: A is (r, in_features), B is (out_features, r). The delta itself, (out_features, in_features), is never built:
with reduced QR decompositions B = Q1 R1 and A^T = Q2 R2, its singular values are those of scaling * R1 R2^T, (r, r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from rankwise.assets.layout import TensorEntry
from rankwise.experiment.module_names import layer_of, layer_sums
from rankwise.modeling.estimate import BaseEstimate

ENERGY = 0.99


@dataclass(frozen=True, kw_only=True)
class RankUse:
    """How much of its rank an adapter uses.

    Energy is the squared Frobenius norm: the best rank-k approximation keeps the k largest squared singular values
    (Eckart and Young 1936).

    Attributes:
        rank_99: The smallest k for which the best rank-k approximations of all deltas together keep 99 % of the energy.
        least: The smallest rank that keeps 99 % of a single delta, over all modules; `most` is the largest.
        enough: The smallest power of two that is at least `rank_99`, capped at `r`.
    """

    r: int
    rank_99: int
    least: int
    most: int
    enough: int

    @property
    def text(self) -> str:
        """The result in words."""
        single = f"single modules need {self.least}" + (f" to {self.most}" if self.most > self.least else "")
        kept = f"rank {self.rank_99} keeps {100 * ENERGY:g} % of the energy of all deltas ({single})"
        if self.enough < self.r:
            return f"r = {self.r} is more than needed: {kept}; r = {self.enough} would be enough"
        return f"r = {self.r} is used: {kept}"


def rank_use(singular_values: Sequence[Sequence[float]], *, r: int) -> RankUse | None:
    """Compute the rank that an adapter uses; None if no delta was learned.

    `singular_values` are those of each delta, largest first. Zero or empty ones are ignored.
    """
    energies = [[value * value for value in values] for values in singular_values if values and values[0] > 0]
    if not energies:
        return None
    pooled = [sum(energy[k] for energy in energies if k < len(energy)) for k in range(max(map(len, energies)))]
    rank = rank_of_energy(pooled)
    singles = [rank_of_energy(energy) for energy in energies]
    enough = 1 << (rank - 1).bit_length()
    return RankUse(r=r, rank_99=rank, least=min(singles), most=max(singles), enough=min(enough, r))


def rank_of_energy(energy: Sequence[float]) -> int:
    """The smallest k whose first k energies (squared singular values, largest first, not all zero) sum to 99 %."""
    kept = kept_energy(energy)
    return next(k for k, share in enumerate(kept, start=1) if share >= ENERGY)


def kept_energy(energy: Sequence[float]) -> list[float]:
    """The share of the energy that rank 1, 2, ... keeps; the last is 1."""
    whole, kept, shares = sum(energy), 0.0, []
    for value in energy:
        kept += value
        shares.append(kept / whole)
    return [*shares[:-1], 1.0]


FLAGS = {
    "untrained": "B is zero: nothing was learned",
    "dead": "the delta is zero or below 1 % of the median one",
    "nonfinite": "NaN or infinity in the factors",
}
"""Problems of a module, and what they mean."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One adapted linear layer: `lora_A` is (r, in_features), `lora_B` is (out_features, r).

    Attributes:
        parameters: Elements of all tensors stored for it.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.
        delta_norm: See `Delta`, as for the ranks; None in a plan without weights.
        singular_values: Of the delta, largest first; empty in a plan, or if a factor is not finite.
        flags: Keys of `FLAGS`.
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
    singular_values: tuple[float, ...] = ()
    flags: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without singular values; numbers that are not finite become null."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "singular_values"}
        values |= {"lora_A": list(self.lora_A), "lora_B": list(self.lora_B), "flags": list(self.flags)}
        if self.delta_norm is not None and not math.isfinite(self.delta_norm):
            values["delta_norm"] = None
        return values


@dataclass(frozen=True, kw_only=True)
class ConsistencyCheck:
    """Two numbers that must agree."""

    name: str
    expected: int
    actual: int

    @property
    def ok(self) -> bool:
        """Whether they agree."""
        return self.expected == self.actual

    @property
    def text(self) -> str:
        """One line: the number, or both if they differ."""
        if self.ok:
            return f"{self.name}: {self.actual:,}"
        return f"{self.name}: expected {self.expected:,}, found {self.actual:,}"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the base and of base plus adapter; measured on loaded models, or estimated for this machine."""

    base: int
    base_and_adapter: int
    measured: bool


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """An adapter's contents; `base` and `memory` are None if the base's configuration is unknown.

    `targets` are in the order of the base's modules if known, otherwise by name. `bytes` does not include the file
    header.
    """

    parameters: int
    bytes: int
    targets: tuple[Target, ...]
    base: BaseEstimate | None
    memory: Memory | None
    checks: tuple[ConsistencyCheck, ...]

    @property
    def layers(self) -> dict[int | None, int]:
        """Parameters per layer; None collects modules outside of layers."""
        return layer_sums((target.module, target.parameters) for target in self.targets)

    @property
    def beside(self) -> int:
        """Parameters that belong to no target: stored embedding rows."""
        return self.parameters - sum(target.parameters for target in self.targets)

    @property
    def share_of_base(self) -> float | None:
        """The adapter's parameters divided by the base's."""
        return self.parameters / self.base.parameters if self.base else None

    @property
    def flagged(self) -> dict[str, list[str]]:
        """Modules by flag, for the flags that occur."""
        modules_by_flag = {flag: [target.module for target in self.targets if flag in target.flags] for flag in FLAGS}
        return {flag: modules for flag, modules in modules_by_flag.items() if modules}

    @property
    def disagreements(self) -> tuple[ConsistencyCheck, ...]:
        """The failed checks."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def rank_use(self) -> RankUse | None:
        """How much of the rank is used; None in a plan, or if nothing was learned."""
        trained = [target.singular_values for target in self.targets if not target.flags]
        return rank_use(trained, r=max((target.lora_A[0] for target in self.targets), default=0))

    def with_memory(self, base: int, base_and_adapter: int) -> Anatomy:
        """A copy with measured memory, in bytes."""
        return replace(self, memory=Memory(base=base, base_and_adapter=base_and_adapter, measured=True))

    def to_dict(self) -> dict[str, Any]:
        """The content of `inspect --json`."""
        use = self.rank_use
        return {
            "adapter": {
                "parameters": self.parameters,
                "bytes": self.bytes,
                "share_of_base": self.share_of_base,
                "rank_use": {**asdict(use), "text": use.text} if use else None,
                "layers": [{"layer": layer, "parameters": count} for layer, count in self.layers.items()],
                "targets": [target.to_dict() for target in self.targets],
            },
            "base": {
                name: getattr(self.base, name)
                for name in ("parameters", "bytes_fp32", "bytes_bf16", "bytes_quantized", "share_4bit")
            }
            if self.base
            else None,
            "memory": asdict(self.memory) if self.memory else None,
            "checks": [{**asdict(check), "ok": check.ok} for check in self.checks],
        }


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def make_checks(
    path: Path,
    header: Sequence[TensorEntry],
    targets: Sequence[Target],
    *,
    ranks: Mapping[str, int],
    linear: Mapping[str, tuple[int, int]] | None,
) -> tuple[ConsistencyCheck, ...]:
    """Check that configuration (`ranks`), tensors (`header`), file size and base (`linear`, None if unknown) agree."""
    parameters = sum(elements(entry) for entry in header)
    formula = sum(ranks[target.module] * (target.lora_A[1] + target.lora_B[0]) for target in targets)
    # The formula does not cover embedding rows and DoRA magnitudes.
    formula += sum(elements(entry) for entry in header if not entry.name.endswith((".lora_A.weight", ".lora_B.weight")))
    checks = [
        ConsistencyCheck(
            name="parameters: r * (in + out) = tensors in the header", expected=formula, actual=parameters
        ),
        ConsistencyCheck(
            name="bytes: elements * size of their dtype = tensors in the header",
            expected=sum(elements(entry) * _BYTES.get(entry.dtype, 0) for entry in header),
            actual=sum(entry.stop - entry.start for entry in header),
        ),
        ConsistencyCheck(
            name="bytes: header and tensors = file",
            expected=max((entry.stop for entry in header), default=0),
            actual=path.stat().st_size,
        ),
        ConsistencyCheck(
            name="ranks: rows of lora_A = columns of lora_B",
            expected=sum(target.lora_A[0] for target in targets),
            actual=sum(target.lora_B[1] for target in targets),
        ),
    ]
    if linear is not None:
        fitting = [target for target in targets if linear.get(target.module) == (target.lora_A[1], target.lora_B[0])]
        checks.append(
            ConsistencyCheck(
                name="targets: linear layers of the base with these shapes", expected=len(targets), actual=len(fitting)
            )
        )
    return tuple(checks)


def elements(entry: TensorEntry) -> int:
    """Number of elements of a tensor."""
    return math.prod(entry.shape)


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Consecutive layers with the same modules, shapes, scaling and dropout.

    `layers` are their numbers; None stands for modules outside of layers. `modules` holds, for each module of a layer,
    that module in all of `layers`.
    """

    layers: tuple[int | None, ...]
    modules: tuple[tuple[Target, ...], ...]

    @property
    def parameters(self) -> int:
        """Parameters of one layer."""
        return sum(alike[0].parameters for alike in self.modules)

    @property
    def label(self) -> str:
        """`layers 0 to 31: 32 alike, 851,968 parameters each`."""
        if len(self.layers) > 1:
            many = f"layers {self.layers[0]} to {self.layers[-1]}: {len(self.layers)} alike"
            return f"{many}, {self.parameters:,} parameters each"
        (layer,) = self.layers
        return f"{'outside of layers' if layer is None else f'layer {layer}'}: {self.parameters:,} parameters"


def fold(anatomy: Anatomy) -> list[LayerGroup]:
    """Group consecutive alike layers, in the model's order."""
    layers = [(layer, tuple(targets)) for layer, targets in groupby(anatomy.targets, lambda t: layer_of(t.module))]
    blocks = []
    for _, group in groupby(layers, lambda entry: tuple(_shape(target) for target in entry[1])):
        alike = list(group)
        columns = zip(*(targets for _, targets in alike), strict=True)
        blocks.append(LayerGroup(layers=tuple(layer for layer, _ in alike), modules=tuple(columns)))
    return blocks


def kind_of(module: str) -> str:
    """The name within its layer: `self_attn.q_proj` for `model.layers.3.self_attn.q_proj`."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else module


def span(values: Sequence[float]) -> str:
    """`0.58 to 2.47`, or one number if both round to it."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _shape(target: Target) -> tuple[object, ...]:
    return kind_of(target.module), target.lora_A, target.lora_B, target.scaling, target.dropout, target.parameters


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Norm and ranks of a delta, from its singular values s.

    Attributes:
        norm: Frobenius norm, the root of the sum of s^2.
        effective_rank: exp of the entropy of s / sum(s), between 1 and r (Roy and Vetterli 2007, "The effective rank: a
            measure of effective dimensionality").
        stable_rank: norm^2 / max(s)^2 (Rudelson and Vershynin 2007).
        rank_99: The smallest rank that keeps 99 % of norm^2. All ranks are 0 for a zero delta.
        singular_values: s, largest first; empty if the delta is not finite.
    """

    norm: float
    effective_rank: float
    stable_rank: float
    rank_99: int
    singular_values: tuple[float, ...] = ()


def singular_values(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Singular values of scaling * B A, largest first, in float64: min(r, in_features, out_features) of them."""
    r1 = torch.linalg.qr(lora_B.double(), mode="r").R
    r2 = torch.linalg.qr(lora_A.double().T, mode="r").R
    values: torch.Tensor = torch.linalg.svdvals(r1 @ r2.T)
    return values * abs(scaling)


def measure_delta(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> Delta:
    """Measure the delta of factors A (r, in_features) and B (out_features, r).

    If a factor is not finite, the norm is NaN and the ranks are 0.
    """
    if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        return Delta(norm=float("nan"), effective_rank=0.0, stable_rank=0.0, rank_99=0)
    values = singular_values(lora_A, lora_B, scaling)
    total, largest = float(values.sum()), float(values.max()) if values.numel() else 0.0
    singular = tuple(values.tolist())
    if largest == 0.0:
        return Delta(norm=0.0, effective_rank=0.0, stable_rank=0.0, rank_99=0, singular_values=singular)
    shares = values / total
    energy = (values / largest) ** 2
    return Delta(
        norm=float(torch.linalg.vector_norm(values)),
        # xlogy defines 0 log 0 as 0.
        effective_rank=float(torch.exp(-torch.special.xlogy(shares, shares).sum())),
        stable_rank=float(energy.sum()),
        rank_99=rank_of_energy(energy.tolist()),
        singular_values=singular,
    )
