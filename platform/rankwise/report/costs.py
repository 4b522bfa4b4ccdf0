"""Quality against cost: adapter bytes, peak memory, time; and the configurations that nothing else beats.

Analysis of variance of the configurations' means by an additive model: an effect for each value of each setting, by
least squares. A setting's sum of squares is what the residual one grows by when the setting is left out (type II
without interactions: in a full grid that is the variance between its values, elsewhere the other settings' share in it
is taken off). Its share of the variance is (SS - df * MS_residual) / SS_total, so that what any setting would explain
by chance does not count (epsilon squared, Kelley 1935, *PNAS* 21, 554), and the F test tells it from noise. A number
with more than eight values is cut into five groups of equal size. Settings that divide the configurations in the same
way, whatever their values, move together and are one setting here. What settings do only together (interactions) is in
none of the shares; it makes the test more cautious.

- Which configurations are worth their cost: those that no other one beats in everything at once.
- Which settings matter: how much of the variance between configurations each of them explains.
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
from rankwise.evaluation.smallest_rank import RankFinding
from rankwise.report.cells import alpha_over_rank, axis_name, settings_text
from rankwise.report.charts import Chart, axis
from rankwise.report.quality import metric_axis


def front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each point is on the Pareto front: no other point is at most as large everywhere and smaller somewhere.

    Args:
        costs: One row for each point, smaller is better in every column, all finite. Equal points are all on it.
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


# That many more configurations than effects to estimate, and no fewer than eight.
LEAST_CONFIGURATIONS, SPARE = 8, 3
SIGNIFICANT = 0.05
_MOST_LEVELS, _GROUPS = 8, 5


@dataclass(frozen=True, kw_only=True)
class Share:
    """One setting, or several that move together.

    Attributes:
        name: Of the setting.
        share: Of the variance, 0 to 1.
        p: Of the F test: how often noise alone explains as much, corrected for the number of settings (Holm 1979,
            *Scandinavian Journal of Statistics* 6, 65): where no setting does anything, one is `real` in 5 % of sweeps.
        levels: How many values or groups.
    """

    name: str
    share: float
    p: float
    levels: int

    @property
    def real(self) -> bool:
        """Whether it is told apart from noise, at 5 %."""
        return self.p <= SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Shares, largest first; of what is left, `noise` is the part that seeds explain (None: one seed each)."""

    shares: tuple[Share, ...]
    noise: float | None
    configurations: int


def importance(comparison: Comparison, finding: RankFinding) -> Importance | str:
    """The shares, or why nothing can be said."""
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
        return f"Nothing varies but {' with '.join(only)}: there is nothing to weigh against it."
    effects = {" with ".join(names): _dummies(levels) for levels, names in groups.items()}
    needed = max(LEAST_CONFIGURATIONS, 1 + sum(table.shape[1] for table in effects.values()) + SPARE)
    if len(results) < needed:
        return (
            f"{len(results)} configurations have a result; for shares of {len(groups)} settings that mean anything, "
            f"{needed} are needed at least."
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


def _settings(comparison: Comparison, finding: RankFinding) -> dict[str, list[Param | None]]:
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
