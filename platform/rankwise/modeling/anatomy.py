"""What an adapter is made of: values. `anatomy_reader` fills them in, `anatomy_page` and the command line show them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rankwise.experiment.module_names import layer_sums
from rankwise.modeling.anatomy_rank import RankUse, rank_use
from rankwise.modeling.estimate import BaseEstimate

FLAGS = {
    "untrained": "B is zero: nothing was learned",
    "dead": "the delta is zero or below 1 % of the median one",
    "nonfinite": "NaN or infinity in the factors",
}
"""What is wrong with a module, and what that means."""


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
        singular_values: Of the delta, largest first; empty as above, and where a factor is not finite.
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
        """For JSON: without the singular values, and a number that is not finite is null."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "singular_values"}
        values |= {"lora_A": list(self.lora_A), "lora_B": list(self.lora_B), "flags": list(self.flags)}
        if self.delta_norm is not None and not math.isfinite(self.delta_norm):
            values["delta_norm"] = None
        return values


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

    @property
    def text(self) -> str:
        """One line: the number, or both where they disagree."""
        if self.ok:
            return f"{self.name}: {self.actual:,}"
        return f"{self.name}: expected {self.expected:,}, found {self.actual:,}"


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
    def beside(self) -> int:
        """Parameters that belong to no target: stored rows of an embedding."""
        return self.parameters - sum(target.parameters for target in self.targets)

    @property
    def share_of_base(self) -> float | None:
        """The adapter's parameters over the base's."""
        return self.parameters / self.base.parameters if self.base else None

    @property
    def flagged(self) -> dict[str, list[str]]:
        """The modules with each flag that occurs."""
        found = {flag: [target.module for target in self.targets if flag in target.flags] for flag in FLAGS}
        return {flag: modules for flag, modules in found.items() if modules}

    @property
    def disagreements(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def rank_use(self) -> RankUse | None:
        """How much of the rank was used; None in a plan, and where nothing was learned."""
        trained = [target.singular_values for target in self.targets if not target.flags]
        return rank_use(trained, r=max((target.lora_A[0] for target in self.targets), default=0))

    def with_memory(self, base: int, base_and_adapter: int) -> Anatomy:
        """The same with measured memory, in bytes."""
        return replace(self, memory=Memory(base=base, base_and_adapter=base_and_adapter, measured=True))

    def to_dict(self) -> dict[str, Any]:
        """The form of `inspect --json`."""
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
                name: getattr(self.base, name) for name in ("parameters", "bytes_fp32", "bytes_bf16", "bytes_quantized")
            }
            if self.base
            else None,
            "memory": asdict(self.memory) if self.memory else None,
            "checks": [{**asdict(check), "ok": check.ok} for check in self.checks],
        }
