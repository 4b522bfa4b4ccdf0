"""The matplotlib figure of quality against rank, for slides and MLflow's list of images."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from rankwise.evaluation.compare import RANK, Comparison, format_param
from rankwise.report.charts import PALETTE
from rankwise.report.quality import Panel, panels, ranks


def failures(comparison: Comparison) -> str | None:
    """Return a text that names the arms without a point, or None."""
    without = [arm for arm in comparison.arms if arm.status != "FINISHED"]
    if not without:
        return None
    named = ", ".join(
        f"r = {format_param(arm.params.get(RANK))} {'pruned' if arm.pruned else arm.status.lower()}"
        for arm in without[:6]
    )
    return f"not shown: {named}" + (f" and {len(without) - 6} more" if len(without) > 6 else "")


BASE_COLOUR = "#666666"
COLUMNS = 4
# The factor between neighbouring series, so that their error bars do not overlap.
APART = 1.05


def rank_figure(comparison: Comparison) -> Figure:
    """Return the plot as a matplotlib figure, without pyplot and its global state.

    Points are means over seeds with one standard error. The bare base is a dashed line with its error as a band; a ring
    marks the best configuration.
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
    if len(shown[0].series) > len(PALETTE):  # Too many settings for a legend.
        return figure
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def _draw(ax: Axes, panel: Panel, all_ranks: list[float]) -> None:
    ax.set_xscale("log", base=2)
    if panel.base is not None and panel.base.value is not None:
        value, error = panel.base.value, panel.base.stderr or 0.0
        ax.axhline(value, color=BASE_COLOUR, linestyle="--", linewidth=1.2, label="bare base")
        ax.axhspan(value - error, value + error, color=BASE_COLOUR, alpha=0.15, linewidth=0)
    if len(panel.series) > len(PALETTE):
        points = [point for series in panel.series for point in series.points]
        ax.scatter([p.rank for p in points], [p.value for p in points], s=8, color=PALETTE[0], alpha=0.4)
    for index, series in enumerate(panel.series if len(panel.series) <= len(PALETTE) else ()):
        colour = PALETTE[index % len(PALETTE)]
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
    ax.set_title(panel.heading, fontsize=10)
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
