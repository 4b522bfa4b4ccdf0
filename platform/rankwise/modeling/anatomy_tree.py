"""The module tree of an adapter with identical layers folded, for whoever draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rankwise.experiment.module_names import layer_of
from rankwise.modeling.anatomy import Anatomy, Target


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive layers that are alike in modules, shapes, scaling and dropout.

    Attributes:
        layers: Their numbers; None stands for what is outside of layers.
        modules: For each module of a layer, that module in all of `layers`.
    """

    layers: tuple[int | None, ...]
    modules: tuple[tuple[Target, ...], ...]

    @property
    def parameters(self) -> int:
        """Of one layer."""
        return sum(alike[0].parameters for alike in self.modules)

    @property
    def label(self) -> str:
        """`layers 0 to 31: 32 alike, 851,968 parameters each`."""
        if len(self.layers) > 1:
            many = f"layers {self.layers[0]} to {self.layers[-1]}: {len(self.layers)} alike"
            return f"{many}, {self.parameters:,} parameters each"
        (layer,) = self.layers
        return f"{'outside of layers' if layer is None else f'layer {layer}'}: {self.parameters:,} parameters"


def fold(anatomy: Anatomy) -> list[Block]:
    """The tree's blocks, in the order of the model."""
    layers = [(layer, tuple(targets)) for layer, targets in groupby(anatomy.targets, lambda t: layer_of(t.module))]
    blocks = []
    for _, group in groupby(layers, lambda entry: tuple(_shape(target) for target in entry[1])):
        alike = list(group)
        columns = zip(*(targets for _, targets in alike), strict=True)
        blocks.append(Block(layers=tuple(layer for layer, _ in alike), modules=tuple(columns)))
    return blocks


def kind_of(module: str) -> str:
    """The name within its layer: `self_attn.q_proj` for `model.layers.3.self_attn.q_proj`."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else module


def span(values: Sequence[float]) -> str:
    """`0.58 to 2.47`, or one number where all round to it."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def decimal_bytes(count: int) -> str:
    """Bytes in decimal units, as disks and the papers count: `109.05 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


def _shape(target: Target) -> tuple[object, ...]:
    return kind_of(target.module), target.lora_A, target.lora_B, target.scaling, target.dropout, target.parameters
