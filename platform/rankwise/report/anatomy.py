"""An adapter's anatomy as one HTML page and as metrics: SVG plots, module tree and tables.

The page needs neither network nor scripts and takes some tens of kilobytes, so that every arm can log one; a script
library in the page would take 4.7 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from rankwise.experiment.module_names import layer_of
from rankwise.files import format_size
from rankwise.modeling.adapter import StoredAdapter, adapter_tensors
from rankwise.modeling.anatomy.anatomy import (
    ENERGY,
    FLAGS,
    Anatomy,
    LayerGroup,
    Target,
    fold,
    kept_energy,
    kind_of,
    span,
)
from rankwise.modeling.anatomy.reader import adapter_anatomy
from rankwise.modeling.base import LoadedBase
from rankwise.report.charts import PALETTE, ChartAxis, svg_figure, svg_text, svg_title, viridis

_WIDTH, _LEFT, _CELL = 980, 190, 22
_PLOT_HEIGHT = 260


def heat_map(
    anatomy: Anatomy, title: str, value: Callable[[Target], float | None], show: Callable[[Target], str]
) -> str:
    """Draw a map with a row per kind of module and a column per layer; flagged modules have a red frame.

    Args:
        anatomy: The anatomy.
        title: The heading.
        value: The number that a module's colour shows; None or NaN is grey.
        show: The tooltip of a cell.
    """
    kinds = list(dict.fromkeys(kind_of(target.module) for target in anatomy.targets))
    layers = list(dict.fromkeys(layer_of(target.module) for target in anatomy.targets))
    width = min(_CELL, (_WIDTH - _LEFT) / len(layers))
    numbers = [number for target in anatomy.targets if _drawn(number := value(target))]
    top = max((number for number in numbers if number is not None), default=0.0)
    cells = []
    for target in anatomy.targets:
        column, row, number = layers.index(layer_of(target.module)), kinds.index(kind_of(target.module)), value(target)
        fill = viridis(number / top if top else 0.0) if number is not None and _drawn(number) else "#ddd"
        frame = ' stroke="#d00" stroke-width="2"' if target.flags else ""
        cells.append(
            f'<rect x="{_LEFT + column * width:.1f}" y="{24 + row * _CELL}" width="{width - 1:.1f}" '
            f'height="{_CELL - 1}" fill="{fill}"{frame}>{svg_title(show(target))}</rect>'
        )
    rows = [svg_text(_LEFT - 6, 24 + row * _CELL + 15, kind, "end") for row, kind in enumerate(kinds)]
    every = max(1, math.ceil(24 / width))
    bottom = 24 + len(kinds) * _CELL
    columns = [
        svg_text(_LEFT + (index + 0.5) * width, bottom + 14, "-" if layer is None else str(layer), "middle")
        for index, layer in enumerate(layers)
        if index % every == 0
    ]
    return svg_figure(title, _WIDTH, bottom + 56, "".join([*cells, *rows, *columns, *_legend(bottom + 28, top)]))


def energy_plot(anatomy: Anatomy, title: str) -> str:
    """Plot the share of the deltas' energy (squared norm) that their best approximation of rank 1, 2, ... keeps.

    One line per kind of module, over all its layers, and a dashed one at 99 %. Empty if nothing was learned.
    """
    energies: dict[str, list[float]] = {}
    for target in anatomy.targets:
        if target.flags or not target.singular_values:
            continue
        pooled = energies.setdefault(kind_of(target.module), [])
        pooled += [0.0] * (len(target.singular_values) - len(pooled))
        for k, number in enumerate(target.singular_values):
            pooled[k] += number * number
    if not energies:
        return ""
    longest = max(len(energy) for energy in energies.values())
    right = _WIDTH - 240
    every = max(1, math.ceil(longest / 16))
    ticks = sorted({1, longest, *range(every, longest - every // 2, every)})
    ranks = ChartAxis(title="rank", low=1, high=max(2, longest), ticks=tuple(ticks))
    shares = ChartAxis(title="energy", low=0, high=1, ticks=(0, 0.25, 0.5, 0.75, 1), text=lambda share: f"{share:.0%}")

    def at(k: float, share: float) -> tuple[float, float]:
        return _LEFT + (right - _LEFT) * ranks.share(k), 24 + _PLOT_HEIGHT * (1 - shares.share(share))

    shapes = [_line(at(1, share), at(longest, share), "#ddd") for share in shares.marks]
    shapes += [svg_text(_LEFT - 6, at(1, share)[1] + 4, shares.text(share), "end") for share in shares.marks[::2]]
    shapes.append(_line(at(1, ENERGY), at(longest, ENERGY), "#d00", dashed=True))
    shapes += [svg_text(at(k, 0)[0], 24 + _PLOT_HEIGHT + 16, ranks.text(k), "middle") for k in ranks.marks]
    shapes.append(svg_text((_LEFT + right) / 2, 24 + _PLOT_HEIGHT + 34, ranks.title, "middle"))
    for index, (kind, energy) in enumerate(energies.items()):
        colour, y = PALETTE[index % len(PALETTE)], 34 + 18 * index
        kept = kept_energy(energy)
        points = " ".join("{:.1f},{:.1f}".format(*at(k, share)) for k, share in enumerate(kept, start=1))
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [
            f'<circle cx="{x:.1f}" cy="{y0:.1f}" r="3" fill="{colour}">'
            f"{svg_title(f'{kind}: rank {k} keeps {share:.2%}')}</circle>"
            for k, share in enumerate(kept, start=1)
            for x, y0 in [at(k, share)]
        ]
        shapes.append(_line((right + 20, y - 4), (right + 40, y - 4), colour))
        shapes.append(svg_text(right + 46, y, kind, "start"))
    return svg_figure(title, _WIDTH, _PLOT_HEIGHT + 66, "".join(shapes))


def bars(title: str, sizes: Mapping[str, int]) -> str:
    """Draw sizes in bytes as horizontal bars."""
    top = max(sizes.values())
    shapes = []
    for index, (name, count) in enumerate(sizes.items()):
        y, length = 24 + index * 26, (_WIDTH - _LEFT - 180) * count / top
        shapes.append(svg_text(_LEFT + 14, y + 15, name, "end"))
        shapes.append(
            f'<rect x="{_LEFT + 20}" y="{y}" width="{max(1.0, length):.1f}" height="20" fill="{PALETTE[0]}"/>'
        )
        shapes.append(svg_text(_LEFT + 26 + length, y + 15, format_size(count), "start"))
    return svg_figure(title, _WIDTH, 30 + 26 * len(sizes), "".join(shapes))


def _legend(y: float, top: float) -> list[str]:
    steps = 40
    strip = [
        f'<rect x="{_LEFT + index * 5}" y="{y}" width="5.5" height="10" fill="{viridis(index / (steps - 1))}"/>'
        for index in range(steps)
    ]
    return [
        *strip,
        svg_text(_LEFT, y + 24, "0", "start"),
        svg_text(_LEFT + steps * 5, y + 24, f"{top:.3g}", "end"),
        svg_text(
            _LEFT + steps * 5 + 20, y + 10, "layers from left to right; red frame: see the remarks above", "start"
        ),
    ]


def _line(start: tuple[float, float], end: tuple[float, float], colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{colour}" '
        f'stroke-width="1.5"{dash}/>'
    )


def _drawn(number: float | None) -> bool:
    return number is not None and math.isfinite(number)


_NAMED = 8  # Modules listed per flag; the table at the end has all.
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
    """Return the page; `over` describes the base and its quantization."""
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
    """Remarks at the top: numbers that disagree, modules that learned nothing, whether the rank is used."""
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
    rows = [["adapter", f"{anatomy.parameters:,}", share, format_size(anatomy.bytes)]]
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


def _block(block: LayerGroup) -> str:
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
    return f"<p>Outside the target modules: stored rows, {anatomy.beside:,} parameters</p>" if anatomy.beside else ""


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


PAGE_NAME = "anatomy.html"
"""The name of the page among a run's artifacts."""

TABLE_NAME = "anatomy.json"
"""The artifact with the numbers, in the form of `inspect --json`; the report of a sweep reads it."""


def trained_page(anatomy: Anatomy, base: LoadedBase, title: str) -> str:
    """Return the page of an adapter over the base that it was trained on, for the artifact `PAGE_NAME`."""
    return make_page(anatomy, title, f"over {base.source} at {base.revision}")


def rank_metrics(anatomy: Anatomy) -> dict[str, float]:
    """Return how much of its rank an adapter uses, as metrics of its run; empty if nothing was learned.

    `adapter.effective_rank` is the mean over the modules (see `delta`), `adapter.rank_99` the smallest rank that keeps
    99 % of the energy of all deltas.
    """
    ranks = [target.effective_rank for target in anatomy.targets if target.effective_rank is not None]
    finite = [rank for rank in ranks if math.isfinite(rank)]
    if not finite or (use := anatomy.rank_use) is None:
        return {}
    return {"adapter.effective_rank": math.fsum(finite) / len(finite), "adapter.rank_99": float(use.rank_99)}


def trained_anatomy(adapter: StoredAdapter, base: LoadedBase) -> Anatomy:
    """Return the anatomy of an adapter over a base in memory, with the memory that this base takes.

    Raises:
        AdapterIntegrityError: The directory is not a complete adapter.
    """
    names = getattr(base.model, "peft_config", None) or {}
    attached = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for name in names
        for tensor in adapter_tensors(base.model, name).values()
    }
    alone = base.memory_bytes - sum(attached.values())
    anatomy = adapter_anatomy(
        adapter,
        base_config=base.path / "config.json",
        quantization=base.quantization,
        module_dtype=str(base.module_dtype).removeprefix("torch."),
    )
    # An adapter is loaded in the dtype of its file.
    return anatomy.with_memory(alone, alone + anatomy.bytes)
