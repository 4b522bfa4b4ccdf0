"""Quality against rank as a figure, for slides and for MLflow's list of images; the report has its own charts.

- What the plots of quality against rank show: a panel per metric, a series per setting, a point per configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from rankwise.evaluation.compare import (
    ALPHA,
    RANK,
    SECONDARY,
    SHARES,
    ArmRecord,
    Comparison,
    Param,
    format_param,
    title,
)
from rankwise.evaluation.metrics import MetricValue
from rankwise.report.cells import axis_name

MAX_PANELS = 8
# A base further away than this many times the range of the adapters presses them onto one line.
FAR = 2.0


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """One configuration: rank, mean over seeds, one standard error, and the arms behind it."""

    rank: float
    value: float
    stderr: float
    arms: tuple[ArmRecord, ...]
    best: bool


@dataclass(frozen=True, kw_only=True)
class Series:
    """Configurations that differ in the rank only (and in what follows from it); `label` says in what from others."""

    label: str
    points: tuple[PlotPoint, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric."""

    key: str
    title: str
    share: bool
    greater_is_better: bool | None
    base: MetricValue | None
    series: tuple[Series, ...]


def panels(comparison: Comparison) -> list[Panel]:
    """Panels with at least one point, the primary metric's first, once more without the base where that is far off."""
    keys = [comparison.primary_metric]
    keys += [key for key in comparison.keys if key not in SECONDARY and key != comparison.primary_metric]
    made = [panel for key in keys if (panel := _panel(comparison, key)).series]
    if made and made[0].key == comparison.primary_metric and _base_is_far(made[0]):
        made.insert(1, replace(made[0], title=f"{made[0].title}, adapters only", base=None, greater_is_better=None))
    return made[:MAX_PANELS]


def ranks(comparison: Comparison) -> list[float]:
    """All ranks of the experiment, of arms without a result too, in order."""
    values = {arm.params.get(RANK) for arm in comparison.arms}
    return sorted(float(value) for value in values if isinstance(value, int | float))


def failures(comparison: Comparison) -> str | None:
    """Names the arms that have no point, or None when all have."""
    without = [arm for arm in comparison.arms if arm.status != "FINISHED"]
    if not without:
        return None
    told = ", ".join(
        f"r = {format_param(arm.params.get(RANK))} {'pruned' if arm.pruned else arm.status.lower()}"
        for arm in without[:6]
    )
    return f"not shown: {told}" + (f" and {len(without) - 6} more" if len(without) > 6 else "")


def _panel(comparison: Comparison, key: str) -> Panel:
    axes = _axes(comparison)
    groups: dict[tuple[tuple[str, Param | None], ...], list[PlotPoint]] = {}
    for configuration in comparison.configurations:
        summary, rank = configuration.metric(key), configuration.params.get(RANK)
        if summary is None or not isinstance(rank, int | float):
            continue
        point = PlotPoint(
            rank=float(rank),
            value=summary.value,
            stderr=summary.stderr or 0.0,
            arms=configuration.finished,
            best=comparison.best in configuration.arms,
        )
        groups.setdefault(tuple((axis, configuration.params.get(axis)) for axis in axes), []).append(point)
    base = comparison.base.get(key)
    return Panel(
        key=key,
        title=title(key),
        share=key in SHARES,
        greater_is_better=comparison.greater_is_better if key == comparison.primary_metric else None,
        base=base if base is not None and base.value is not None else None,
        series=tuple(
            Series(label=_label(dict(settings)), points=tuple(sorted(points, key=lambda point: point.rank)))
            for settings, points in groups.items()
        ),
    )


def _base_is_far(panel: Panel) -> bool:
    if panel.base is None or panel.base.value is None:
        return False
    points = [point for series in panel.series for point in series.points]
    low = min(point.value - point.stderr for point in points)
    high = max(point.value + point.stderr for point in points)
    return max(low - panel.base.value, panel.base.value - high) > FAR * (high - low)


def _axes(comparison: Comparison) -> list[str]:
    """Settings that tell configurations of one rank apart. What follows from the rank (alpha = 2r) is none."""
    return [axis for axis in (ALPHA, *comparison.axes) if any(len(values) > 1 for values in _by_rank(comparison, axis))]


def _by_rank(comparison: Comparison, axis: str) -> Sequence[set[Param | None]]:
    values: dict[Param | None, set[Param | None]] = {}
    for configuration in comparison.configurations:
        params = configuration.params
        values.setdefault(params.get(RANK), set()).add(params.get(axis))
    return list(values.values())


def _label(settings: Mapping[str, Param | None]) -> str:
    if not settings:
        return "adapter"
    return ", ".join(f"{axis_name(axis)} {format_param(value)}" for axis, value in settings.items())


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
    if len(shown[0].series) > len(COLOURS):  # A cloud: a legend of hundreds of settings would be the whole figure.
        return figure
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def _draw(ax: Axes, panel: Panel, all_ranks: list[float]) -> None:
    ax.set_xscale("log", base=2)
    if panel.base is not None and panel.base.value is not None:
        value, error = panel.base.value, panel.base.stderr or 0.0
        ax.axhline(value, color=BASE_COLOUR, linestyle="--", linewidth=1.2, label="bare base")
        ax.axhspan(value - error, value + error, color=BASE_COLOUR, alpha=0.15, linewidth=0)
    if len(panel.series) > len(COLOURS):
        points = [point for series in panel.series for point in series.points]
        ax.scatter([p.rank for p in points], [p.value for p in points], s=8, color=COLOURS[0], alpha=0.4)
    for index, series in enumerate(panel.series if len(panel.series) <= len(COLOURS) else ()):
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
