"""An adapter's anatomy on a terminal: the module tree with identical layers folded, sizes, deltas, checks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from rankwise.modeling.anatomy import Anatomy, Target

_WORST = 8


def render(anatomy: Anatomy, title: str, base_layer: str) -> RenderableType:
    """Everything there is to see.

    Args:
        anatomy: What was found.
        title: What it was found in.
        base_layer: The class of the adapted layers in the base, `Linear4bit` for a 4-bit one.
    """
    parts: list[RenderableType] = [_tree(anatomy, title, base_layer), "", _sizes(anatomy)]
    flagged = [target for target in anatomy.targets if target.flags]
    if flagged:
        parts += ["", *_flags(flagged, len(anatomy.targets))]
    if anatomy.checks:
        parts += ["", *_checks(anatomy)]
    return Group(*parts)


def gigabytes(count: int) -> str:
    """Bytes in decimal units, as disks and the papers count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


def _tree(anatomy: Anatomy, title: str, base_layer: str) -> Tree:
    from rankwise.modeling.estimate import layer_of

    share = f", {anatomy.share_of_base:.3%} of the base" if anatomy.share_of_base is not None else ""
    tree = Tree(
        Text.assemble((title, "bold"), f"  {anatomy.parameters:,} parameters, {gigabytes(anatomy.bytes)}{share}")
    )
    layers = [(layer, tuple(targets)) for layer, targets in groupby(anatomy.targets, lambda t: layer_of(t.module))]
    for _, same in groupby(layers, lambda entry: tuple(_shape(target) for target in entry[1])):
        folded = list(same)
        first, last = folded[0][0], folded[-1][0]
        each = sum(target.parameters for target in folded[0][1])
        if len(folded) > 1:
            label = f"layers {first} to {last}: {len(folded)} alike, {each:,} parameters each"
        else:
            label = f"{'outside of layers' if first is None else f'layer {first}'}: {each:,} parameters"
        branch = tree.add(Text(label, style="cyan"))
        for column in zip(*(targets for _, targets in folded), strict=True):
            _module(branch, column, base_layer)
    return tree


def _module(branch: Tree, alike: Sequence[Target], base_layer: str) -> None:
    """One module of one layer, or of many alike."""
    target = alike[0]
    (r, inputs), (outputs, _) = target.lora_A, target.lora_B
    node = branch.add(Text.assemble((_suffix(target.module), "bold"), f"  {target.parameters:,} parameters"))
    node.add(f"base_layer  {base_layer} {inputs} -> {outputs}")
    node.add(f"lora_A      {r} x {inputs}")
    node.add(f"lora_B      {outputs} x {r}")
    node.add(f"dropout     {target.dropout:g}    scaling {target.scaling:g}")
    if target.delta_norm is not None:
        norms = [t.delta_norm for t in alike if t.delta_norm is not None]
        ranks = [t.effective_rank for t in alike if t.effective_rank is not None]
        kept = [t.rank_99 for t in alike if t.rank_99 is not None]
        node.add(
            f"delta       norm {_span(norms)}    effective rank {_span(ranks)} of {r}    "
            f"99 % of its energy in rank {_span(kept)}"
        )


def _sizes(anatomy: Anatomy) -> Table:
    how = "estimated" if anatomy.memory is None or not anatomy.memory.measured else "measured"
    table = Table("", "parameters", "float32", "16 bit", "quantized", f"here, {how}", box=None, padding=(0, 2))
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    if anatomy.base is not None and anatomy.memory is not None:
        base = anatomy.base
        table.add_row(
            "base",
            f"{base.parameters:,}",
            gigabytes(base.bytes_fp32),
            gigabytes(base.bytes_bf16),
            gigabytes(base.bytes_quantized),
            gigabytes(anatomy.memory.base),
        )
        both = base.parameters + anatomy.parameters
        table.add_row(
            "base + adapter",
            f"{both:,}",
            gigabytes(4 * both),
            gigabytes(2 * both),
            gigabytes(base.bytes_quantized + 2 * anatomy.parameters),
            gigabytes(anatomy.memory.base_and_adapter),
        )
    table.add_row(
        "adapter",
        f"{anatomy.parameters:,}",
        gigabytes(4 * anatomy.parameters),
        gigabytes(2 * anatomy.parameters),
        "",
        gigabytes(anatomy.bytes),
    )
    return table


def _flags(flagged: Sequence[Target], total: int) -> list[RenderableType]:
    meaning = {
        "untrained": "B is zero: nothing was learned",
        "dead": "the delta is below 1 % of the median one",
        "nonfinite": "NaN or infinity in the factors",
    }
    lines: list[RenderableType] = []
    for flag, why in meaning.items():
        names = [target.module for target in flagged if flag in target.flags]
        if names:
            shown = ", ".join(names[:_WORST]) + (f" and {len(names) - _WORST} more" if len(names) > _WORST else "")
            lines.append(Text(f"{flag}: {len(names)} of {total} modules ({why}): {shown}", style="yellow"))
    return lines


def _checks(anatomy: Anatomy) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for check in anatomy.checks:
        if check.ok:
            lines.append(Text(f"ok        {check.name}: {check.actual:,}", style="green"))
        else:
            lines.append(
                Text(f"DISAGREE  {check.name}: expected {check.expected:,}, found {check.actual:,}", style="bold red")
            )
    return lines


def _shape(target: Target) -> tuple[object, ...]:
    return _suffix(target.module), target.lora_A, target.lora_B, target.scaling, target.dropout, target.parameters


def _suffix(module: str) -> str:
    """The name within its layer: `self_attn.q_proj` for `model.layers.3.self_attn.q_proj`."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else module


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
