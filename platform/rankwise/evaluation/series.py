"""What the plots of quality against rank show: a panel per metric, a series per setting, a point per configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rankwise.evaluation.compare import ALPHA, RANK, ArmRecord, Comparison, Param
from rankwise.evaluation.labels import SECONDARY, SHARES, format_param, title
from rankwise.evaluation.metrics import MetricValue
from rankwise.evaluation.report_words import axis_name

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
