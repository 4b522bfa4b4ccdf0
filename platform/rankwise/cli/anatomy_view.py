"""An adapter's anatomy on a terminal: the module tree with identical layers folded, sizes, deltas, checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from rankwise.cli.output import size

if TYPE_CHECKING:
    from rankwise.modeling.anatomy import Anatomy, Target

_WORST = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
# More layers than this make a line that no terminal shows whole.
_LONGEST = 100


def render(anatomy: Anatomy, title: str, over: str, base_layer: str) -> RenderableType:
    """Everything there is to see; what disagrees comes first.

    Args:
        anatomy: What was found.
        title: What it was found in.
        over: The base, in words.
        base_layer: The class of the adapted layers in the base, `Linear4bit` for a 4-bit one.
    """
    parts: list[RenderableType] = []
    if anatomy.disagreements:
        parts += [Text(f"DISAGREE  {check.text}", style="bold red") for check in anatomy.disagreements] + [Text()]
    parts += [_tree(anatomy, title, over, base_layer), "", _sizes(anatomy)]
    if anatomy.base is not None:
        parts.append(Text("quantized: linear layers quantized, the rest in 16 bit; here: as it is loaded", style="dim"))
    remarks = [*_flags(anatomy), *_rank_use(anatomy)]
    if remarks:
        parts += ["", *remarks]
    if anatomy.checks:
        parts += ["", *_checks(anatomy)]
    return Group(*parts)


def _tree(anatomy: Anatomy, title: str, over: str, base_layer: str) -> Tree:
    from rankwise.modeling.anatomy_tree import fold

    share = f", {anatomy.share_of_base:.3%} of the base" if anatomy.share_of_base is not None else ""
    tree = Tree(
        Text.assemble(
            (title, "bold"),
            f"  {anatomy.parameters:,} parameters, {size(anatomy.bytes)}{share}",
            (f"\n{over}" if over else "", "dim"),
        )
    )
    for block in fold(anatomy):
        branch = tree.add(Text(block.label, style="cyan"))
        for alike in block.modules:
            _module(branch, alike, base_layer)
    if anatomy.beside:
        tree.add(Text(f"beside the targets: stored rows, {anatomy.beside:,} parameters", style="cyan"))
    return tree


def _module(branch: Tree, alike: Sequence[Target], base_layer: str) -> None:
    """One module of one layer, or of many alike."""
    from rankwise.modeling.anatomy_tree import kind_of, span

    target = alike[0]
    (r, inputs), (outputs, _) = target.lora_A, target.lora_B
    node = branch.add(Text.assemble((kind_of(target.module), "bold"), f"  {target.parameters:,} parameters"))
    node.add(f"base_layer  {base_layer} {inputs} -> {outputs}")
    node.add(f"lora_A      {r} x {inputs}")
    node.add(f"lora_B      {outputs} x {r}")
    node.add(f"dropout     {target.dropout:g}    scaling {target.scaling:g}")
    norms = [one.delta_norm for one in alike if one.delta_norm is not None]
    ranks = [one.effective_rank for one in alike if one.effective_rank is not None]
    kept = [one.rank_99 for one in alike if one.rank_99 is not None]
    if norms and ranks and kept:
        node.add(
            f"delta       norm {span(norms)}{_sparks(norms)}\n"
            f"            effective rank {span(ranks)} of {r}{_sparks(ranks)}\n"
            f"            99 % of its energy in rank {span(kept)}"
        )


def _sparks(values: Sequence[float]) -> str:
    """One block a layer, as high as its value over the largest one; a cross for what is not finite."""
    if not 1 < len(values) <= _LONGEST:
        return ""
    top = max((value for value in values if math.isfinite(value)), default=0.0)
    return "  " + "".join(
        "x" if not math.isfinite(value) else _BLOCKS[round((len(_BLOCKS) - 1) * value / top) if top else 0]
        for value in values
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
            size(base.bytes_fp32),
            size(base.bytes_bf16),
            size(base.bytes_quantized),
            size(anatomy.memory.base),
        )
        both = base.parameters + anatomy.parameters
        table.add_row(
            "base + adapter",
            f"{both:,}",
            size(4 * both),
            size(2 * both),
            size(base.bytes_quantized + 2 * anatomy.parameters),
            size(anatomy.memory.base_and_adapter),
        )
    table.add_row(
        "adapter",
        f"{anatomy.parameters:,}",
        size(4 * anatomy.parameters),
        size(2 * anatomy.parameters),
        "",
        size(anatomy.bytes),
    )
    return table


def _flags(anatomy: Anatomy) -> list[RenderableType]:
    from rankwise.modeling.anatomy import FLAGS

    lines: list[RenderableType] = []
    for flag, names in anatomy.flagged.items():
        shown = ", ".join(names[:_WORST]) + (f" and {len(names) - _WORST} more" if len(names) > _WORST else "")
        total = len(anatomy.targets)
        lines.append(Text(f"{flag}: {len(names)} of {total} modules ({FLAGS[flag]}): {shown}", style="yellow"))
    return lines


def _rank_use(anatomy: Anatomy) -> list[RenderableType]:
    use = anatomy.rank_use
    return [] if use is None else [Text(use.text, style="bold")]


def _checks(anatomy: Anatomy) -> list[RenderableType]:
    return [
        Text(f"ok        {check.text}", style="green")
        if check.ok
        else Text(f"DISAGREE  {check.text}", style="bold red")
        for check in anatomy.checks
    ]
