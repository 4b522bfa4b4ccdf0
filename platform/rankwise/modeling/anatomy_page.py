"""An adapter's anatomy as one HTML page: plots and a table, readable without a network."""

from __future__ import annotations

import html
from collections.abc import Callable

import plotly.graph_objects as go

from rankwise.modeling.anatomy import Anatomy, Target
from rankwise.modeling.estimate import layer_of

_STYLE = (
    "body{font-family:sans-serif;margin:2em;max-width:76em}table{border-collapse:collapse;font-size:90%}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child"
    "{text-align:left}.bad{color:#b00020;font-weight:bold}"
)


def make_page(anatomy: Anatomy, title: str) -> str:
    """The page: sizes, checks, heat maps of norm and effective rank over layers and modules, and all targets."""
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(anatomy), _checks(anatomy)]
    if any(target.delta_norm is not None for target in anatomy.targets):
        figures = [
            _heat(anatomy, "Norm of the delta (scaling * B A)", lambda target: target.delta_norm),
            _heat(anatomy, "Effective rank of the delta, as a share of r", _rank_share),
        ]
        # The script of plotly goes into the page once.
        parts += [
            figure.to_html(full_html=False, include_plotlyjs="inline" if index == 0 else False)
            for index, figure in enumerate(figures)
        ]
    parts.append(_table(anatomy))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _summary(anatomy: Anatomy) -> str:
    lines = [f"adapter: {anatomy.parameters:,} parameters, {anatomy.bytes:,} bytes"]
    if anatomy.base is not None:
        base = anatomy.base
        lines.append(
            f"base: {base.parameters:,} parameters; {base.bytes_fp32:,} bytes in float32, {base.bytes_bf16:,} in "
            f"16 bit, {base.bytes_quantized:,} quantized"
        )
    if anatomy.memory is not None:
        how = "measured" if anatomy.memory.measured else "estimated"
        lines.append(
            f"memory here, {how}: base {anatomy.memory.base:,} bytes, with the adapter "
            f"{anatomy.memory.base_and_adapter:,}"
        )
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _checks(anatomy: Anatomy) -> str:
    return "".join(
        f"<p>ok: {html.escape(check.name)} ({check.actual:,})</p>"
        if check.ok
        else f'<p class="bad">DISAGREE: {html.escape(check.name)}: expected {check.expected:,}, '
        f"found {check.actual:,}</p>"
        for check in anatomy.checks
    )


def _heat(anatomy: Anatomy, title: str, value: Callable[[Target], float | None]) -> go.Figure:
    """A map with a row for each kind of module and a column for each layer."""
    rows = list(dict.fromkeys(_kind(target) for target in anatomy.targets))
    columns = list(dict.fromkeys(layer_of(target.module) for target in anatomy.targets))
    cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    for target in anatomy.targets:
        cells[rows.index(_kind(target))][columns.index(layer_of(target.module))] = value(target)
    labels = ["-" if column is None else str(column) for column in columns]
    figure = go.Figure(go.Heatmap(z=cells, x=labels, y=rows, colorscale="Viridis"))
    figure.update_layout(
        title=title,
        height=160 + 34 * len(rows),
        xaxis={"title": "layer", "type": "category"},
        yaxis_autorange="reversed",
    )
    return figure


def _rank_share(target: Target) -> float | None:
    return None if target.effective_rank is None else target.effective_rank / target.lora_A[0]


def _kind(target: Target) -> str:
    return ".".join(part for part in target.module.split(".")[-2:] if not part.isdigit())


def _table(anatomy: Anatomy) -> str:
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
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
