"""Quality against cost: the Pareto front over adapter size, memory and time; and which settings matter (ANOVA).

Importance is an analysis of variance of the configurations' means by an additive least-squares model, with one effect
per value of each setting. A setting's sum of squares (SS) is the increase of the residual SS when the setting is left
out (type II, without interactions). Its share of the variance is (SS - df * MS_residual) / SS_total, which corrects for
what it would explain by chance (epsilon squared, Kelley 1935, *PNAS* 21, 554); the F test compares it with noise.
Numbers with more than eight values are cut into five groups of equal size. Settings that divide the configurations in
the same way count as one. Interactions are in none of the shares; they make the test more cautious.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from scipy.special import fdtrc

from rankwise.evaluation.compare import (
    ALPHA,
    RANK,
    Comparison,
    Configuration,
    Param,
    format_bytes,
    format_seconds,
    title,
    with_error,
)
from rankwise.evaluation.findings import Findings
from rankwise.report.charts import Chart, axis
from rankwise.report.quality import metric_axis
from rankwise.report.tables import alpha_over_rank, axis_name, settings_text


def front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Return whether each point is on the Pareto front. `costs` are finite, smaller is better.

    A point is off the front if another one is at most as large everywhere and smaller somewhere; equal points stay.
    """
    if not len(costs):
        return []
    table = np.asarray(costs, dtype=np.float64)
    kept = []
    for row in table:
        beats = np.all(table <= row, axis=1) & np.any(table < row, axis=1)
        kept.append(not bool(beats.any()))
    return kept


_COSTS = {
    "adapter_bytes": ("adapter size", format_bytes),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "seconds": ("time of training", format_seconds),
}


@dataclass(frozen=True, kw_only=True)
class Costed:
    """A configuration's quality and costs, each the mean over its seeds."""

    configuration: Configuration
    quality: float
    costs: tuple[float, ...]
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class Costs:
    """All configurations with known costs; `names` are the costs that are known for all of them."""

    names: tuple[str, ...]
    points: tuple[Costed, ...]


def costs(finding: Findings) -> Costs | None:
    """Return quality and costs; None if fewer than two configurations have both."""
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


def cost_charts(comparison: Comparison, finding: Findings, found: Costs) -> list[Markup]:
    """Return one chart per cost; filled points are on the front of all costs, the line is that of this cost alone."""
    return [_chart(comparison, finding, found, at) for at in range(len(found.names))]


def front_rows(comparison: Comparison, finding: Findings, found: Costs) -> list[dict[str, str]]:
    """Return the configurations on the front as texts by heading, smallest adapter first."""
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


def _chart(comparison: Comparison, finding: Findings, found: Costs, at: int) -> Markup:
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
        ring = "ring" if point.configuration in finding.chosen else ""
        cost_text = ", ".join(_text(n, cost) for n, cost in zip(found.names, point.costs, strict=True))
        quality = with_error(finding.key, point.quality)
        tip = f"{settings_text(comparison, point.configuration)}: {quality}, {cost_text}"
        if many and not point.on_front and not ring:
            chart.point(point.costs[at], point.quality, colour=None, radius=1.8, style="faint")
        else:
            style = f"{ring} {'' if point.on_front else 'hollow'}"
            colour = 0 if point.on_front else None
            chart.point(point.costs[at], point.quality, colour=colour, tip=tip, radius=6 if ring else 4, style=style)
    chart.legend("on the Pareto front", 0)
    chart.legend("dominated by another configuration", None, "hollow")
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


# The least number of configurations, and how many more than effects there must be.
LEAST_CONFIGURATIONS, SPARE = 8, 3
SIGNIFICANT = 0.05
_MOST_LEVELS, _GROUPS = 8, 5


@dataclass(frozen=True, kw_only=True)
class Share:
    """The importance of one setting, or of several that change together.

    Attributes:
        name: The setting.
        share: Its share of the variance, 0 to 1.
        p: Of the F test, corrected for the number of settings (Holm 1979, *Scandinavian Journal of Statistics* 6, 65):
            if no setting has an effect, some setting is `real` in 5 % of sweeps.
        levels: The number of values or groups.
    """

    name: str
    share: float
    p: float
    levels: int

    @property
    def real(self) -> bool:
        """Whether it is significant at 5 %."""
        return self.p <= SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Shares, largest first; `noise` is the share that seeds explain (None with one seed each)."""

    shares: tuple[Share, ...]
    noise: float | None
    configurations: int


def importance(comparison: Comparison, finding: Findings) -> Importance | str:
    """Return the shares, or the reason why there are none."""
    configurations = finding.configurations
    means = [each.metric(finding.key) for each in configurations]
    results = np.array([mean.value for mean in means if mean is not None])
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, values in _settings(comparison, finding).items():
        levels = _levels(values)
        if len(set(levels)) > 1:
            groups.setdefault(tuple(levels), []).append(name)
    if len(groups) < 2:
        only = next(iter(groups.values()), ["the seed"])
        return f"Only {' with '.join(only)} varies, so there is no other setting to compare it with."
    effects = {" with ".join(names): _dummies(levels) for levels, names in groups.items()}
    needed = max(LEAST_CONFIGURATIONS, 1 + sum(table.shape[1] for table in effects.values()) + SPARE)
    if len(results) < needed:
        return (
            f"{len(results)} configurations have a result; at least {needed} are needed for meaningful shares of "
            f"{len(groups)} settings."
        )
    total = float(np.sum((results - results.mean()) ** 2))
    if total == 0:
        return "All configurations have the same result."
    shares = _shares(effects, results, total)
    spreads = [(mean.spread, mean.seeds) for mean in means if mean is not None]
    of_seeds = [spread**2 / seeds for spread, seeds in spreads if spread is not None]
    noise = min(1.0, float(np.mean(of_seeds)) * len(results) / total) if of_seeds else None
    return Importance(
        shares=tuple(sorted(shares, key=lambda each: -each.share)), noise=noise, configurations=len(results)
    )


def _settings(comparison: Comparison, finding: Findings) -> dict[str, list[Param | None]]:
    """The settings that vary, by name. Alpha counts as alpha / r where that has fewer values: it is what was chosen."""
    found: dict[str, list[Param | None]] = {}
    for key in (RANK, *comparison.varying):
        values = [each.params.get(key) for each in finding.configurations]
        name = "r" if key == RANK else axis_name(key)
        if key == ALPHA:
            ratios: list[Param | None] = [alpha_over_rank(each) for each in finding.configurations]
            if len(set(ratios)) < len(set(values)):
                name, values = "alpha / r", ratios
        found[name] = values
    return found


def _shares(effects: Mapping[str, NDArray[np.float64]], results: NDArray[np.float64], total: float) -> list[Share]:
    n = len(results)

    def fit(tables: Iterable[NDArray[np.float64]]) -> tuple[float, int]:
        """Residual sum of squares of an additive model, and how many independent effects it has."""
        design = np.column_stack([np.ones(n), *tables])
        solution, _, rank, _ = np.linalg.lstsq(design, results, rcond=None)
        return float(np.sum((results - design @ solution) ** 2)), int(rank)

    residual, rank = fit(effects.values())
    free = n - rank
    within = residual / free
    found = []
    for name, table in effects.items():
        without, fewer = fit(other for key, other in effects.items() if key != name)
        df, own = rank - fewer, max(0.0, without - residual)
        if df == 0:  # It follows from the others together.
            continue
        p = float(fdtrc(df, free, own / df / within)) if within > 0 else float(own <= 0)
        share = max(0.0, (own - df * within) / total)
        found.append(Share(name=name, share=share, p=p, levels=table.shape[1] + 1))
    return _corrected(found)


def _corrected(shares: Sequence[Share]) -> list[Share]:
    """With each p times the number of settings that are not told apart before it, none smaller than one before it."""
    corrected: list[Share] = []
    for place, share in enumerate(sorted(shares, key=lambda each: each.p)):
        before = corrected[-1].p if corrected else 0.0
        corrected.append(replace(share, p=max(before, min(1.0, share.p * (len(shares) - place)))))
    return corrected


def _dummies(levels: Sequence[int]) -> NDArray[np.float64]:
    """A column of zeros and ones for each level but the first."""
    table: NDArray[np.float64] = (np.array(levels)[:, None] == np.arange(1, max(levels) + 1)[None, :]).astype(float)
    return table


def _levels(values: Sequence[Param | None]) -> list[int]:
    """Each value's level, counted from 0 as they first appear: equal lists divide the configurations in one way."""
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    cut: Sequence[Param | None] = values
    if len(set(values)) > _MOST_LEVELS and len(numbers) == len(values):
        edges = np.quantile(numbers, np.linspace(0, 1, _GROUPS + 1)[1:-1])
        cut = [int(level) for level in np.searchsorted(edges, numbers, side="right")]
    order = {value: at for at, value in enumerate(dict.fromkeys(cut))}
    return [order[value] for value in cut]
