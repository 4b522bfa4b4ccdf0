"""Quality against cost: adapter bytes, peak memory, time; and the configurations that nothing else beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rankwise.evaluation.compare import Comparison, Configuration
from rankwise.evaluation.labels import format_bytes, format_seconds, title, with_error
from rankwise.evaluation.pareto import front
from rankwise.evaluation.rank_finding import RankFinding
from rankwise.evaluation.report_axis import axis
from rankwise.evaluation.report_quality import metric_axis
from rankwise.evaluation.report_svg import Chart
from rankwise.evaluation.report_words import settings_text

_COSTS = {
    "adapter_bytes": ("adapter size", format_bytes),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "seconds": ("time of training", format_seconds),
}


@dataclass(frozen=True, kw_only=True)
class Costed:
    """A configuration with its quality and its costs, each the mean over its seeds."""

    configuration: Configuration
    quality: float
    costs: tuple[float, ...]
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class Costs:
    """All configurations whose costs are known; `names` are those that are known for all and differ."""

    names: tuple[str, ...]
    points: tuple[Costed, ...]


def costs(finding: RankFinding) -> Costs | None:
    """Quality and costs; None where fewer than two configurations have both."""
    rows = []
    for each in finding.configurations:
        mean = each.metric(finding.key)
        found = tuple(_mean(each, name) for name in _COSTS)
        if mean is not None and found[0] is not None:
            rows.append((each, mean.value, found))
    names = [name for at, name in enumerate(_COSTS) if all(row[2][at] is not None for row in rows)]
    columns = [list(_COSTS).index(name) for name in names]
    known = [(each, value, tuple(float(found[at] or 0) for at in columns)) for each, value, found in rows]
    if len(known) < 2:
        return None
    sign = -1.0 if finding.greater_is_better else 1.0
    kept = front([(sign * value, *found) for _, value, found in known])
    points = [
        Costed(configuration=each, quality=value, costs=found, on_front=on)
        for (each, value, found), on in zip(known, kept, strict=True)
    ]
    return Costs(names=tuple(names), points=tuple(points))


def cost_charts(comparison: Comparison, finding: RankFinding, found: Costs) -> list[Markup]:
    """A chart for each cost; filled points are on the front of all costs together, the line is of this cost alone."""
    return [_chart(comparison, finding, found, at) for at in range(len(found.names))]


def front_rows(comparison: Comparison, finding: RankFinding, found: Costs) -> list[dict[str, str]]:
    """The configurations on the front, smallest adapter first, as texts by heading."""
    rows = []
    for point in sorted((each for each in found.points if each.on_front), key=lambda each: each.costs):
        mean = point.configuration.metric(finding.key)
        assert mean is not None
        row = {"configuration": settings_text(comparison, point.configuration)}
        row[title(finding.key)] = with_error(finding.key, mean.value, mean.stderr)
        for name, cost in zip(found.names, point.costs, strict=True):
            row[_COSTS[name][0]] = _text(name, cost)
        rows.append(row)
    return rows


def _chart(comparison: Comparison, finding: RankFinding, found: Costs, at: int) -> Markup:
    name = found.names[at]
    values = [point.costs[at] for point in found.points]
    log = max(values) > 4 * min(values) > 0
    distinct = sorted(set(values))
    ticks = distinct if name == "adapter_bytes" and len(distinct) <= 7 else None
    chart = Chart(
        title=f"{title(finding.key)} against {_COSTS[name][0]}",
        x=axis(_COSTS[name][0], values, log=log, ticks=ticks, text=lambda value: _text(name, value)),
        y=metric_axis(finding.key, [point.quality for point in found.points]),
    )
    chart.line(_steps(found.points, at, finding.greater_is_better), colour=0, style="thin")
    many = len(found.points) > 150
    for point in found.points:
        ring = "ring" if point.configuration is finding.chosen else ""
        told = ", ".join(_text(n, cost) for n, cost in zip(found.names, point.costs, strict=True))
        quality = with_error(finding.key, point.quality)
        tip = f"{settings_text(comparison, point.configuration)}: {quality}, {told}"
        if many and not point.on_front and not ring:
            chart.point(point.costs[at], point.quality, colour=None, radius=1.8, style="faint")
        else:
            style = f"{ring} {'' if point.on_front else 'hollow'}"
            colour = 0 if point.on_front else None
            chart.point(point.costs[at], point.quality, colour=colour, tip=tip, radius=6 if ring else 4, style=style)
    chart.legend("on the front", 0)
    chart.legend("beaten in everything by another one", None, "hollow")
    return chart.draw()


def _steps(points: Sequence[Costed], at: int, greater: bool) -> list[tuple[float, float]]:
    """The best quality up to each cost, as steps."""
    steps: list[tuple[float, float]] = []
    best: float | None = None
    for point in sorted(points, key=lambda each: (each.costs[at], -each.quality if greater else each.quality)):
        if best is None or (point.quality > best if greater else point.quality < best):
            if best is not None:
                steps.append((point.costs[at], best))
            best = point.quality
            steps.append((point.costs[at], best))
    if best is not None:
        steps.append((max(point.costs[at] for point in points), best))
    return steps


def _text(name: str, value: float) -> str:
    return format_bytes(round(value)) if name != "seconds" else format_seconds(value)


def _mean(configuration: Configuration, name: str) -> float | None:
    values = [value for arm in configuration.finished if (value := getattr(arm, name)) is not None]
    return sum(values) / len(values) if values else None
