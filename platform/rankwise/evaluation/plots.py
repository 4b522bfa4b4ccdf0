"""Quality against rank: a figure for reports, an interactive page that needs no network."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from plotly.subplots import make_subplots

from rankwise.evaluation.compare import Comparison
from rankwise.evaluation.labels import format_bytes, format_count, format_param, format_seconds, with_error
from rankwise.evaluation.series import Panel, PlotPoint, Series, failures, panels, ranks

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BASE_COLOUR = "#666666"
COLUMNS = 4
# Series beside one another, so that their error bars do not cover each other: ranks are drawn apart by this factor.
APART = 1.05


def rank_figure(comparison: Comparison) -> Figure:
    """The plot as a matplotlib figure, without pyplot and its global state.

    Points are means over seeds with one standard error; the bare base is a dashed line with its own error as a band;
    the best configuration has a ring.
    """
    shown = panels(comparison)
    columns = min(COLUMNS, len(shown)) or 1
    rows = math.ceil(len(shown) / columns) or 1
    figure = Figure(figsize=(3.8 * columns, 3.3 * rows + 0.8), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    missing = failures(comparison)
    figure.suptitle(_headline(comparison) + (f"\n{missing}" if missing else ""), fontsize=11)
    if not shown:
        return figure
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, ax in enumerate(axes.flat):
        if index < len(shown):
            _draw(ax, shown[index], ranks(comparison))
        else:
            ax.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def _draw(ax: Axes, panel: Panel, all_ranks: list[float]) -> None:
    ax.set_xscale("log", base=2)
    if panel.base is not None and panel.base.value is not None:
        value, error = panel.base.value, panel.base.stderr or 0.0
        ax.axhline(value, color=BASE_COLOUR, linestyle="--", linewidth=1.2, label="bare base")
        ax.axhspan(value - error, value + error, color=BASE_COLOUR, alpha=0.15, linewidth=0)
    for index, series in enumerate(panel.series):
        colour = COLOURS[index % len(COLOURS)]
        shift = APART ** (index - (len(panel.series) - 1) / 2)
        ax.errorbar(
            [point.rank * shift for point in series.points],
            [point.value for point in series.points],
            yerr=[point.stderr for point in series.points],
            color=colour,
            marker="o",
            markersize=5,
            linewidth=1.5,
            capsize=3,
            label=series.label,
        )
        best = [point for point in series.points if point.best]
        if best:
            ax.plot(
                [point.rank * shift for point in best],
                [point.value for point in best],
                linestyle="none",
                marker="o",
                markersize=12,
                markerfacecolor="none",
                markeredgecolor=colour,
                label="best",
            )
    ax.set_title(_heading(panel), fontsize=10)
    ax.set_xlabel("LoRA rank r", fontsize=9)
    ax.set_xticks(all_ranks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(min(all_ranks) / 1.4, max(all_ranks) * 1.4)
    ax.yaxis.set_major_formatter(
        PercentFormatter(1.0) if panel.share else FuncFormatter(lambda value, _: f"{value:,g}")
    )
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)


def _headline(comparison: Comparison) -> str:
    return f"{comparison.experiment}: {'no result yet' if comparison.best is None else 'quality against rank'}"


def _heading(panel: Panel) -> str:
    if panel.greater_is_better is None:
        return panel.title
    return f"{panel.title} (decides, {'greater' if panel.greater_is_better else 'smaller'} is better)"


def rank_plot(comparison: Comparison) -> Any:
    """The same plot as a plotly figure: settings, run and model version of a point appear under the mouse."""
    shown = panels(comparison)
    columns = min(COLUMNS, len(shown)) or 1
    rows = math.ceil(len(shown) / columns) or 1
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=[escape(_heading(panel)) for panel in shown])
    for index, panel in enumerate(shown):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for at, series in enumerate(panel.series):
            figure.add_trace(_trace(panel, series, COLOURS[at % len(COLOURS)], first=index == 0), **place)
        if panel.base is not None and panel.base.value is not None:
            value, error = panel.base.value, panel.base.stderr or 0.0
            figure.add_trace(_base_line(panel, ranks(comparison), first=index == 0), **place)
            figure.add_hrect(y0=value - error, y1=value + error, fillcolor=BASE_COLOUR, opacity=0.15, **place)
        figure.update_xaxes(type="log", tickvals=ranks(comparison), title_text="LoRA rank r", **place)
        figure.update_yaxes(tickformat="~%" if panel.share else None, **place)
    missing = failures(comparison)
    figure.update_layout(
        title=escape(_headline(comparison)) + (f"<br><sup>{escape(missing)}</sup>" if missing else ""),
        template="plotly_white",
        height=360 * rows + 120,
        hoverlabel={"align": "left"},
    )
    return figure


def to_html(figure: Any) -> str:
    """The figure as one page with everything in it: it opens from a disk, without a network."""
    # plotly 7 has a button that sends the data to its maker's cloud, on by default.
    config = {"displaylogo": False, "showSendToCloud": False}
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config=config))


def _trace(panel: Panel, series: Series, colour: str, *, first: bool) -> Any:
    points = series.points
    return go.Scatter(
        x=[point.rank for point in points],
        y=[point.value for point in points],
        error_y={"type": "data", "array": [point.stderr for point in points]},
        mode="lines+markers",
        name=escape(series.label),
        legendgroup=series.label,
        showlegend=first,
        line={"color": colour},
        marker={
            "size": [13 if point.best else 8 for point in points],
            "symbol": ["star" if point.best else "circle" for point in points],
        },
        hovertext=[_hover(panel, point) for point in points],
        hoverinfo="text",
    )


def _base_line(panel: Panel, all_ranks: list[float], *, first: bool) -> Any:
    assert panel.base is not None
    told = with_error(panel.key, panel.base.value, panel.base.stderr)
    return go.Scatter(
        x=[min(all_ranks), max(all_ranks)],
        y=[panel.base.value, panel.base.value],
        mode="lines+markers",
        marker={"size": 1},
        line={"dash": "dash", "color": BASE_COLOUR},
        name="bare base",
        legendgroup="bare base",
        showlegend=first,
        hovertext=f"bare base<br>{escape(panel.title)} {told} (n = {panel.base.n})",
        hoverinfo="text",
    )


def _hover(panel: Panel, point: PlotPoint) -> str:
    arm = point.arms[0]
    told = with_error(panel.key, point.value, point.stderr)
    lines = [f"<b>r = {point.rank:g}</b>{' (best)' if point.best else ''}", f"{panel.title} {told}"]
    lines += [f"{key} {format_param(item)}" for key, item in arm.params.items() if key in _SHOWN_PARAMS]
    lines.append(
        f"{format_count(arm.adapter_parameters)} parameters, {format_bytes(arm.adapter_bytes)}, "
        f"{format_seconds(arm.seconds)}"
    )
    for each in point.arms:
        seed = f"seed {format_param(each.params.get('seed'))}: " if len(point.arms) > 1 else ""
        lines.append(f"{seed}arm {each.spec_hash[:12]}, {each.model_uri or f'run {each.run_id}'}")
    return "<br>".join(lines[:1] + [escape(line) for line in lines[1:]])


_SHOWN_PARAMS = ("lora.alpha", "lora.dropout", "lora.target_modules", "lora.rslora", "training.learning_rate")
