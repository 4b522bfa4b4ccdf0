"""An adapter's anatomy as one HTML page: plots, tree and tables, readable without a network or scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rankwise.modeling.anatomy import FLAGS, Anatomy, Target
from rankwise.modeling.anatomy_plots import bars, energy_plot, heat_map
from rankwise.modeling.anatomy_tree import Block, decimal_bytes, fold, kind_of, span

# Of modules with the same flag; the table at the end has all.
_NAMED = 8
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:64em;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em;margin-bottom:0;overflow-wrap:anywhere}h2{font-size:1.1em;margin:2em 0 .5em}
.over{color:#666;margin:0 0 1em;overflow-wrap:anywhere}
.bad{border:2px solid #d00;color:#b00020;padding:.5em 1em;font-weight:bold;margin:.7em 0}
.note{background:#fff6e0;padding:.5em 1em;margin:.7em 0;overflow-wrap:anywhere}.use{background:#eef6ff;padding:.5em 1em}
table{border-collapse:collapse;font-size:90%}td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}td.flag{color:#b00020;font-weight:bold}
figure{margin:1.5em 0}figcaption{font-weight:bold}svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif}
ul{margin:.2em 0}code{font-size:95%}summary{cursor:pointer;margin:.5em 0}
"""


def make_page(anatomy: Anatomy, title: str, over: str = "") -> str:
    """The page.

    Args:
        anatomy: What to show.
        title: What was taken apart.
        over: Its base and quantization, in words.
    """
    learned = any(target.delta_norm is not None for target in anatomy.targets)
    parts = [
        f'<h1>{escape(title)}</h1><p class="over">{escape(over)}</p>',
        *_remarks(anatomy),
        _sizes(anatomy),
        _memory(anatomy),
        *(_plots(anatomy) if learned else []),
        "<h2>Modules</h2>",
        *(_block(block) for block in fold(anatomy)),
        _beside(anatomy),
        _checks(anatomy),
        f"<details><summary>All {len(anatomy.targets):,} modules</summary>{_table(anatomy, learned)}</details>",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _remarks(anatomy: Anatomy) -> list[str]:
    """What a reader must not miss: numbers that disagree, modules that learned nothing, whether the rank is used."""
    parts = [f'<p class="bad">DISAGREE: {escape(check.text)}</p>' for check in anatomy.disagreements]
    total = len(anatomy.targets)
    for flag, modules in anatomy.flagged.items():
        names = ", ".join(modules[:_NAMED]) + (f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else "")
        parts.append(
            f'<p class="note"><b>{flag}</b>: {len(modules)} of {total} modules ({FLAGS[flag]}): {escape(names)}</p>'
        )
    if (use := anatomy.rank_use) is not None:
        parts.append(f'<p class="use">{escape(use.text)}</p>')
    return parts


def _sizes(anatomy: Anatomy) -> str:
    share = f"{anatomy.share_of_base:.3%}" if anatomy.share_of_base is not None else ""
    rows = [["adapter", f"{anatomy.parameters:,}", share, decimal_bytes(anatomy.bytes)]]
    if (base := anatomy.base) is not None:
        rows.append(["base", f"{base.parameters:,}", "", ""])
    return _rows(["", "parameters", "share of the base", "tensors in the file"], rows)


def _memory(anatomy: Anatomy) -> str:
    base, memory = anatomy.base, anatomy.memory
    if base is None or memory is None:
        return ""
    how = "measured" if memory.measured else "estimated"
    sizes = {
        "base, float32": base.bytes_fp32,
        "base, 16 bit": base.bytes_bf16,
        "base, quantized": base.bytes_quantized,
        f"base here, {how}": memory.base,
        f"with the adapter, {how}": memory.base_and_adapter,
    }
    return bars("Memory; quantized: linear layers quantized, the rest in 16 bit", sizes)


def _plots(anatomy: Anatomy) -> list[str]:
    def show(target: Target) -> str:
        return (
            f"{target.module}: norm {_number(target.delta_norm)}, effective rank {_number(target.effective_rank)} of "
            f"{target.lora_A[0]}, 99 % of its energy in rank {target.rank_99}"
            + (f" ({', '.join(target.flags)})" if target.flags else "")
        )

    return [
        heat_map(anatomy, "Norm of the delta, scaling * B A", lambda target: target.delta_norm, show),
        heat_map(anatomy, "Effective rank of the delta", lambda target: target.effective_rank, show),
        energy_plot(anatomy, "Energy (squared norm) that a smaller rank would keep, over all layers"),
    ]


def _block(block: Block) -> str:
    return f"<details open><summary>{escape(block.label)}</summary>{''.join(map(_module, block.modules))}</details>"


def _module(alike: Sequence[Target]) -> str:
    target = alike[0]
    (r, inputs), (outputs, _) = target.lora_A, target.lora_B
    lines = [
        f"base_layer {inputs:,} → {outputs:,}",
        f"lora_A {r:,} x {inputs:,}, lora_B {outputs:,} x {r:,}",
        f"dropout {target.dropout:g}, scaling {target.scaling:g}",
    ]
    norms = [one.delta_norm for one in alike if one.delta_norm is not None]
    ranks = [one.effective_rank for one in alike if one.effective_rank is not None]
    if norms and ranks:
        lines.append(f"delta: norm {span(norms)}, effective rank {span(ranks)} of {r}")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f"<ul><li><b>{escape(kind_of(target.module))}</b>, {target.parameters:,} parameters<ul>{items}</ul></li></ul>"
    )


def _beside(anatomy: Anatomy) -> str:
    return f"<p>Beside the targets: stored rows, {anatomy.beside:,} parameters</p>" if anatomy.beside else ""


def _checks(anatomy: Anatomy) -> str:
    items = "".join(f"<li>{'ok' if check.ok else 'DISAGREE'}: {escape(check.text)}</li>" for check in anatomy.checks)
    return f"<h2>Formula, header and file</h2><ul>{items}</ul>" if items else ""


def _table(anatomy: Anatomy, learned: bool) -> str:
    heads = ["module", "lora_A", "lora_B", "parameters", "norm", "effective rank", "rank of 99 %", "flags"]
    rows = [
        [
            target.module,
            f"{target.lora_A[0]} x {target.lora_A[1]}",
            f"{target.lora_B[0]} x {target.lora_B[1]}",
            f"{target.parameters:,}",
            _number(target.delta_norm),
            _number(target.effective_rank),
            _number(target.rank_99),
            ", ".join(target.flags),
        ]
        for target in anatomy.targets
    ]
    return _rows(heads, rows) if learned else _rows(heads[:4], [row[:4] for row in rows])


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
