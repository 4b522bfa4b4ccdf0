"""Charts of quality: against the rank, and against every other setting that varies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rankwise.evaluation.compare import Comparison, Configuration, Param
from rankwise.evaluation.labels import SHARES, format_param, title, with_error
from rankwise.evaluation.rank_finding import RankFinding, rank_of
from rankwise.evaluation.report_axis import Axis, axis
from rankwise.evaluation.report_svg import COLOURS, Chart, shorten
from rankwise.evaluation.report_words import alpha_over_rank, axis_name, settings_text
from rankwise.evaluation.series import FAR, Panel, panels, ranks

MOST_SLICES = 9
_MOST_SERIES = COLOURS


def rank_charts(comparison: Comparison, finding: RankFinding) -> list[Markup]:
    """A chart for each metric, the primary one first; one standard error over examples and seeds as bars.

    More settings than there are colours make a cloud: then the best configuration of each rank by the primary metric
    has a line of its own, in every chart.
    """
    shown = [panel for panel in panels(comparison) if not panel.title.endswith("adapters only")]
    return [_rank_chart(comparison, finding, panel) for panel in shown]


def _rank_chart(comparison: Comparison, finding: RankFinding, panel: Panel) -> Markup:
    key, base = panel.key, panel.base
    points = [point for series in panel.series for point in series.points]
    extent = [value for point in points for value in (point.value - point.stderr, point.value + point.stderr)]
    far = base is not None and base.value is not None and _far(base.value, extent)
    if base is not None and base.value is not None and not far:
        extent += [base.value - (base.stderr or 0), base.value + (base.stderr or 0)]
    note = f"bare base: {with_error(key, base.value, base.stderr)}, off the scale" if base is not None and far else ""
    chart = Chart(
        title=_heading(comparison, panel), x=_rank_axis(ranks(comparison)), y=metric_axis(key, extent), note=note
    )
    if base is not None and base.value is not None and not far:
        tip = f"bare base: {with_error(key, base.value, base.stderr)} (n = {base.n:,})"
        chart.band(base.value - (base.stderr or 0), base.value + (base.stderr or 0), tip=tip)
        chart.level(base.value, tip=tip)
        chart.legend("bare base", None)
    if len(panel.series) > _MOST_SERIES:
        for point in points:
            chart.point(point.rank, point.value, colour=None, radius=2, style="faint")
        chart.legend(f"{len(points):,} configurations", None)
        best = [each for each, _, _ in finding.by_rank]
        _configurations(chart, comparison, finding, best, key, 0, f"best of its rank by {title(finding.key)}")
    else:
        for number, series in enumerate(panel.series):
            of_series = {id(point.arms[0]): point for point in series.points}
            members = [
                each for each in comparison.configurations if each.finished and id(each.finished[0]) in of_series
            ]
            members.sort(key=rank_of)
            label = "" if len(panel.series) == 1 else shorten(series.label)
            _configurations(chart, comparison, finding, members, key, number, label)
    return chart.draw()


def _configurations(
    chart: Chart, comparison: Comparison, finding: RankFinding, members: Sequence[Configuration], key: str, colour: int,
    label: str,
) -> None:  # fmt: skip
    means = [(rank_of(each), each, mean) for each in members if (mean := each.metric(key)) is not None]
    chart.line([(rank, mean.value) for rank, _, mean in means], colour=colour)
    for rank, each, mean in means:
        if mean.seeds > 1:
            for arm in each.finished:
                if key in arm.metrics and (value := arm.metrics[key].value) is not None:
                    seed = format_param(arm.params.get("seed"))
                    tip = f"r = {rank:g}, seed {seed}: {with_error(key, value, arm.metrics[key].stderr)}"
                    chart.point(rank, value, colour=colour, radius=2, style="faint", tip=tip)
        ring = "ring" if each is finding.chosen else ""
        seeds = f", {mean.seeds} seeds" if mean.seeds > 1 else ""
        tip = f"{settings_text(comparison, each)}: {title(key)} {with_error(key, mean.value, mean.stderr)}{seeds}"
        chart.point(rank, mean.value, colour=colour, error=mean.stderr, tip=tip, radius=6 if ring else 4, style=ring)
    if label:
        chart.legend(label, colour)


def slice_charts(comparison: Comparison, finding: RankFinding) -> list[Markup]:
    """The judged metric against alpha / r, dropout and other settings that vary: configurations, and their means."""
    charts = []
    for name, values in slices(comparison, finding.configurations).items():
        chart = _slice(comparison, finding, name, values)
        if chart is not None:
            charts.append(chart)
    return charts[:MOST_SLICES]


def slices(comparison: Comparison, configurations: Sequence[Configuration]) -> dict[str, list[Param | None]]:
    """Settings that vary, with each configuration's value: alpha / r first, then dropout, then the others."""
    found: dict[str, list[Param | None]] = {"alpha / r": [alpha_over_rank(each) for each in configurations]}
    for key in sorted(comparison.axes, key=lambda key: key != "lora.dropout"):
        found[axis_name(key)] = [each.params.get(key) for each in configurations]
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _slice(comparison: Comparison, finding: RankFinding, name: str, values: Sequence[Param | None]) -> Markup | None:
    key, configurations = finding.key, finding.configurations
    means = [each.metric(key) for each in configurations]
    known = [(value, each, mean) for value, each, mean in zip(values, configurations, means, strict=True) if mean]
    places, x = value_axis(name, [value for value, _, _ in known])
    all_ranks = sorted({rank_of(each) for each in configurations})
    chart = Chart(title=f"{title(key)} by {name}", x=x, y=metric_axis(key, [mean.value for _, _, mean in known]))
    coloured = 1 < len(all_ranks) <= COLOURS
    groups: dict[float, list[float]] = {}
    radius = 3.5 if len(known) <= 100 else 2
    for value, each, mean in known:
        rank = rank_of(each)
        colour = all_ranks.index(rank) if coloured else None
        tip = (
            f"{settings_text(comparison, each)}: {with_error(key, mean.value, mean.stderr)}"
            if len(known) <= 200
            else ""
        )
        chart.point(places[value], mean.value, colour=colour, radius=radius, style="faint", tip=tip)
        groups.setdefault(places[value], []).append(mean.value)
    if coloured:
        for number, rank in enumerate(all_ranks):
            chart.legend(f"r = {rank:g}", number, "faint")
    if len(groups) <= 12:
        middle = {place: math.fsum(group) / len(group) for place, group in sorted(groups.items())}
        chart.line(list(middle.items()), colour=None, style="thick")
        for place, level in middle.items():
            tip = f"mean of {len(groups[place]):,}: {with_error(key, level)}"
            chart.point(place, level, colour=None, radius=4, tip=tip)
        chart.legend("mean of all with this value", None)
    return chart.draw()


def value_axis(name: str, values: Sequence[Param | None]) -> tuple[Mapping[Param | None, float], Axis]:
    """Where values lie: numbers by size, on a log axis where they span magnitudes; anything else side by side."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        order = sorted(set(values), key=lambda value: (str(type(value)), str(value)))
        names = {float(at): shorten(format_param(value), 18) for at, value in enumerate(order)}
        x = axis(name, [-0.4, len(order) - 0.6], ticks=list(names), text=lambda at: names.get(at, ""), room=0)
        return {value: float(at) for at, value in enumerate(order)}, x
    distinct = sorted(set(numbers))
    log = distinct[0] > 0 and distinct[-1] / distinct[0] >= 8
    return {v: float(v) for v in values if isinstance(v, int | float)}, axis(
        name, distinct, log=log, ticks=distinct if len(distinct) <= 8 else None
    )


def metric_axis(key: str, values: Sequence[float]) -> Axis:
    """The vertical axis of a metric; shares in percent."""
    if key not in SHARES:
        return axis(title(key), values)
    bounds = (0.0, math.inf) if max(values) > 1 else (0.0, 1.0)  # A mean relative error may be more than 100 %.
    return axis(title(key), values, text=lambda value: f"{100 * value:.4g} %", bounds=bounds)


def _rank_axis(all_ranks: Sequence[float]) -> Axis:
    return axis("rank r", all_ranks, log=True, ticks=all_ranks)


def _heading(comparison: Comparison, panel: Panel) -> str:
    if panel.key != comparison.primary_metric:
        return panel.title
    return f"{panel.title} (decides, {'greater' if comparison.greater_is_better else 'smaller'} is better)"


def _far(value: float, extent: Sequence[float]) -> bool:
    low, high = min(extent), max(extent)
    return max(low - value, value - high) > FAR * (high - low)
