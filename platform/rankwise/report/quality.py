"""Charts of quality against rank and settings, of learning curves, and of how much of the rank is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from rankwise.evaluation.compare import (
    ALPHA,
    RANK,
    SECONDARY,
    SHARES,
    ArmRecord,
    Comparison,
    Configuration,
    Param,
    format_param,
    title,
    with_error,
)
from rankwise.evaluation.findings import Findings, rank_of
from rankwise.evaluation.metrics import MetricValue
from rankwise.report.charts import COLOURS, Chart, ChartAxis, axis, shorten
from rankwise.report.tables import alpha_over_rank, axis_name, settings_text, status_of
from rankwise.tracking.query import MetricPoint

MOST_SLICES = 9
_MOST_SERIES = COLOURS
MAX_PANELS = 8
# A base further away than this many times the range of the adapters would compress them to one line.
_FAR = 2.0


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """One configuration: rank, mean over seeds, one standard error, and its arms."""

    rank: float
    value: float
    stderr: float
    arms: tuple[ArmRecord, ...]
    best: bool


@dataclass(frozen=True, kw_only=True)
class Series:
    """Configurations that differ only in the rank and what follows from it; `label` has the other settings."""

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

    @property
    def heading(self) -> str:
        """The title; for the primary metric also which direction is better."""
        if self.greater_is_better is None:
            return self.title
        return f"{self.title} (primary metric, {'greater' if self.greater_is_better else 'smaller'} is better)"

    @property
    def extent(self) -> list[float]:
        """The ends of all error bars."""
        points = [point for series in self.series for point in series.points]
        return [value for point in points for value in (point.value - point.stderr, point.value + point.stderr)]

    @property
    def base_is_far(self) -> bool:
        """Whether the base would compress the adapters to one line."""
        if self.base is None or self.base.value is None:
            return False
        low, high = min(self.extent), max(self.extent)
        return max(low - self.base.value, self.base.value - high) > _FAR * (high - low)


def panels(comparison: Comparison) -> list[Panel]:
    """Return panels with at least one point, the primary metric's first; if the base is far off, again without it."""
    keys = [comparison.primary_metric]
    keys += [key for key in comparison.keys if key not in SECONDARY and key != comparison.primary_metric]
    made = [panel for key in keys if (panel := _panel(comparison, key)).series]
    if made and made[0].key == comparison.primary_metric and made[0].base_is_far:
        made.insert(1, replace(made[0], title=f"{made[0].title}, adapters only", base=None, greater_is_better=None))
    return made[:MAX_PANELS]


def ranks(comparison: Comparison) -> list[float]:
    """Return all ranks of the experiment in order, including those without a result."""
    values = {arm.params.get(RANK) for arm in comparison.arms}
    return sorted(float(value) for value in values if isinstance(value, int | float))


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


def _axes(comparison: Comparison) -> list[str]:
    """Settings that distinguish configurations of one rank, without those that follow from it (alpha = 2r)."""
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


def rank_charts(comparison: Comparison, finding: Findings) -> list[Markup]:
    """Return one chart per metric, the primary one first; bars are one standard error over examples and seeds.

    With more settings than colours, only the best configuration of each rank by the primary metric has a line.
    """
    shown = [panel for panel in panels(comparison) if not panel.title.endswith("adapters only")]
    return [_rank_chart(comparison, finding, panel) for panel in shown]


def _rank_chart(comparison: Comparison, finding: Findings, panel: Panel) -> Markup:
    key, base = panel.key, panel.base
    points = [point for series in panel.series for point in series.points]
    extent, far = panel.extent, panel.base_is_far
    if base is not None and base.value is not None and not far:
        extent += [base.value - (base.stderr or 0), base.value + (base.stderr or 0)]
    note = f"bare base: {with_error(key, base.value, base.stderr)}, off the scale" if base is not None and far else ""
    chart = Chart(title=panel.heading, x=_rank_axis(ranks(comparison)), y=metric_axis(key, extent), note=note)
    if base is not None and base.value is not None and not far:
        tip = f"bare base: {with_error(key, base.value, base.stderr)} (n = {base.n:,})"
        chart.band(base.value - (base.stderr or 0), base.value + (base.stderr or 0), tip=tip)
        chart.level(base.value, tip=tip)
        chart.legend("bare base", None)
    if len(panel.series) > _MOST_SERIES:
        for point in points:
            chart.point(point.rank, point.value, colour=None, radius=2, style="faint")
        chart.legend(f"{len(points):,} configurations", None)
        best = finding.by_rank
        _configurations(chart, comparison, finding, best, key, 0, f"best mean {title(finding.key)} of each rank")
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
    chart: Chart, comparison: Comparison, finding: Findings, members: Sequence[Configuration], key: str, colour: int,
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
        ring = "ring" if each in finding.chosen else ""
        seeds = f", {mean.seeds} seeds" if mean.seeds > 1 else ""
        tip = f"{settings_text(comparison, each)}: {title(key)} {with_error(key, mean.value, mean.stderr)}{seeds}"
        chart.point(rank, mean.value, colour=colour, error=mean.stderr, tip=tip, radius=6 if ring else 4, style=ring)
    if label:
        chart.legend(label, colour)


def slice_charts(comparison: Comparison, finding: Findings) -> list[Markup]:
    """Return charts of the judged metric against alpha / r, dropout and other settings that vary."""
    charts = []
    for name, values in slices(comparison, finding.configurations).items():
        chart = _slice(comparison, finding, name, values)
        if chart is not None:
            charts.append(chart)
    return charts[:MOST_SLICES]


def slices(comparison: Comparison, configurations: Sequence[Configuration]) -> dict[str, list[Param | None]]:
    """Return the settings that vary with each configuration's value: alpha / r first, then dropout, then the others."""
    found: dict[str, list[Param | None]] = {"alpha / r": [alpha_over_rank(each) for each in configurations]}
    for key in sorted(comparison.axes, key=lambda key: key != "lora.dropout"):
        found[axis_name(key)] = [each.params.get(key) for each in configurations]
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _slice(comparison: Comparison, finding: Findings, name: str, values: Sequence[Param | None]) -> Markup | None:
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
        chart.legend("mean of all configurations with this value", None)
    return chart.draw()


def value_axis(name: str, values: Sequence[Param | None]) -> tuple[Mapping[Param | None, float], ChartAxis]:
    """Return positions and axis of values: numbers by size (log if they span magnitudes), other values side by side."""
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


def metric_axis(key: str, values: Sequence[float]) -> ChartAxis:
    """Return the vertical axis of a metric; shares in percent."""
    if key not in SHARES:
        return axis(title(key), values)
    bounds = (0.0, math.inf) if max(values) > 1 else (0.0, 1.0)  # A mean relative error may be more than 100 %.
    return axis(title(key), values, text=lambda value: f"{100 * value:.4g} %", bounds=bounds)


def _rank_axis(all_ranks: Sequence[float]) -> ChartAxis:
    return axis("rank r", all_ranks, log=True, ticks=all_ranks)


MOST_CURVES = 24
_MOST_POINTS = 80


def chosen_arms(comparison: Comparison, finding: Findings) -> list[ArmRecord]:
    """Return the arms whose curves are shown: all, or the best of each rank and a selection of the others."""
    started = [arm for arm in comparison.arms if arm.run_id and arm.status != "SCHEDULED"]
    if len(started) <= MOST_CURVES:
        return started
    best = [each.finished[0] for each in finding.by_rank]
    others = [arm for arm in started if arm not in best]
    cut = [arm for arm in others if arm.status != "FINISHED"]
    rest = [arm for arm in others if arm.status == "FINISHED"]
    half = (MOST_CURVES - len(best[:MOST_CURVES])) // 2
    return [*best[:MOST_CURVES], *_evenly(cut, half), *_evenly(rest, half)]


def curve_charts(
    comparison: Comparison,
    arms: Sequence[ArmRecord],
    curves: Mapping[str, Mapping[str, Sequence[MetricPoint]]],
    keys: Sequence[str],
) -> list[Markup]:
    """Return one chart per key with a curve of at least two points; curves of arms that ended early are dashed."""
    charts = [_curves(comparison, arms, curves, key) for key in keys]
    return [chart for chart in charts if chart is not None]


def _curves(
    comparison: Comparison,
    arms: Sequence[ArmRecord],
    curves: Mapping[str, Mapping[str, Sequence[MetricPoint]]],
    key: str,
) -> Markup | None:
    lines = [(arm, points) for arm in arms if len(points := thinned(curves.get(arm.run_id, {}).get(key, []))) > 1]
    if not lines:
        return None
    ranks = sorted(
        {arm.params[RANK] for arm in comparison.arms if isinstance(arm.params.get(RANK), int | float)}, key=_number
    )
    by_rank = len(ranks) > 1
    values = [value for _, points in lines for _, value in points]
    # One diverged arm must not compress the others to one line.
    top = sorted(values)[math.ceil(0.98 * (len(values) - 1))]
    shown = [value for value in values if value <= top + (top - min(values))]
    name = "training loss" if key == "train.loss" else f"{title(key)} on the evaluation rows"
    averaged = any(len(curves[arm.run_id][key]) > _MOST_POINTS for arm, _ in lines)
    chart = Chart(
        title=name,
        x=axis("step", [step for _, points in lines for step, _ in points], room=0.02, whole=True),
        y=replace(metric_axis(key, shown), title=title(key).removeprefix("train.")),
        note="each point is the mean of several steps" if averaged else "",
    )
    legend = not by_rank and len(lines) <= COLOURS
    for number, (arm, points) in enumerate(lines):
        colour = ranks.index(arm.params[RANK]) if by_rank and arm.params.get(RANK) in ranks else number
        cut = arm.status not in {"FINISHED", "RUNNING"}
        label = arm_text(comparison, arm)
        drawn = [(step, min(value, chart.y.high)) for step, value in points]
        style = "dashed" if cut else "faint" if len(lines) > 12 else ""
        chart.line(drawn, colour=colour, tip=f"{label} ({status_of(arm)})", style=style)
        if cut:
            chart.point(
                *drawn[-1], colour=4 if not by_rank else colour, radius=3, tip=f"{label}: {status_of(arm)}", style="end"
            )
        if legend:
            chart.legend(shorten(label), number)
    if by_rank:
        for number, rank in enumerate(ranks):
            chart.legend(f"r = {format_param(rank)}", number)
    return chart.draw()


def thinned(points: Sequence[MetricPoint]) -> list[tuple[float, float]]:
    """Return steps and values, at most 80: of more, means of neighbours."""
    latest = {point.step: point.value for point in points}
    pairs = sorted(latest.items())
    size = -(-len(pairs) // _MOST_POINTS)
    if size <= 1:
        return [(float(step), value) for step, value in pairs]
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [
        (sum(step for step, _ in part) / len(part), math.fsum(value for _, value in part) / len(part)) for part in parts
    ]


def layer_chart(
    comparison: Comparison, arms: Sequence[ArmRecord], layers: Mapping[str, Mapping[int, float]]
) -> Markup | None:
    """Return the effective rank of each layer's deltas, one line per arm; None if no arm has an anatomy."""
    lines = [(arm, layers[arm.run_id]) for arm in arms if arm.run_id in layers]
    if not lines:
        return None
    chart = Chart(
        title="effective rank by layer",
        x=axis("layer", [layer for _, line in lines for layer in line], room=0.03, whole=True),
        y=axis("effective rank", [0.0, *(rank for _, line in lines for rank in line.values())]),
        note="mean over the modules of a layer; the best arm of each rank",
    )
    for number, (arm, line) in enumerate(lines):
        label = arm_text(comparison, arm)
        chart.line([(float(layer), rank) for layer, rank in line.items()], colour=number, tip=label)
        for layer, rank in line.items():
            chart.point(layer, rank, colour=number, radius=2.5, tip=f"{label}, layer {layer}: {rank:.3g}")
        chart.legend(f"r = {format_param(arm.params.get(RANK))}", number)
    return chart.draw()


def use_chart(comparison: Comparison) -> Markup | None:
    """Return the effective rank of all finished arms against r, with a line at full use of the rank."""
    points = [
        (float(rank), arm.effective_rank, arm)
        for arm in comparison.arms
        if arm.effective_rank is not None and isinstance(rank := arm.params.get(RANK), int | float)
    ]
    if not points:
        return None
    ranks = sorted({rank for rank, _, _ in points})
    top = [*ranks, *(value for _, value, _ in points)]
    chart = Chart(
        title="effective rank against r",
        x=axis("rank r", ranks, log=True, ticks=ranks),
        y=axis("effective rank", top, log=True, ticks=ranks),
        note="on the dashed line, all directions are used equally",
    )
    if len(ranks) > 1:
        chart.line([(rank, rank) for rank in ranks], colour=None, style="dashed")
    for rank, value, arm in points:
        used = "" if arm.rank_99 is None else f"; rank {arm.rank_99} keeps 99 % of the energy"
        tip = f"{arm_text(comparison, arm)}: {value:.3g}{used}"
        chart.point(rank, value, colour=0, radius=3.5, tip=tip, style="faint" if len(points) > 30 else "")
    return chart.draw()


def arm_text(comparison: Comparison, arm: ArmRecord) -> str:
    """`r = 8, learning rate 0.002, seed 1`."""
    parts = [f"r = {format_param(arm.params.get(RANK))}"]
    parts += [f"{axis_name(key)} {format_param(arm.params.get(key))}" for key in comparison.varying]
    if len({each.params.get("seed") for each in comparison.arms}) > 1:
        parts.append(f"seed {format_param(arm.params.get('seed'))}")
    return ", ".join(parts)


def _evenly(arms: Sequence[ArmRecord], count: int) -> list[ArmRecord]:
    if len(arms) <= count:
        return list(arms)
    return [arms[round(at * (len(arms) - 1) / max(1, count - 1))] for at in range(count)]


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
