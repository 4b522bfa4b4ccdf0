"""Charts of what was learned: losses by step, and how much of its rank each layer uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from rankwise.evaluation.compare import RANK, ArmRecord, Comparison
from rankwise.evaluation.labels import format_param, title
from rankwise.evaluation.rank_finding import RankFinding
from rankwise.evaluation.report_axis import axis
from rankwise.evaluation.report_quality import metric_axis
from rankwise.evaluation.report_svg import COLOURS, Chart, shorten
from rankwise.evaluation.report_words import axis_name, status_of
from rankwise.tracking.query import Point

MOST_CURVES = 24
_MOST_POINTS = 80


def chosen_arms(comparison: Comparison, finding: RankFinding | None) -> list[ArmRecord]:
    """Arms whose curves are shown: all, or of many the best of each rank and some of those that were cut off."""
    started = [arm for arm in comparison.arms if arm.run_id and arm.status != "SCHEDULED"]
    if len(started) <= MOST_CURVES:
        return started
    best = [each.finished[0] for each, _, _ in finding.by_rank] if finding is not None else []
    others = [arm for arm in started if arm not in best]
    cut = [arm for arm in others if arm.status != "FINISHED"]
    rest = [arm for arm in others if arm.status == "FINISHED"]
    half = (MOST_CURVES - len(best[:MOST_CURVES])) // 2
    return [*best[:MOST_CURVES], *_evenly(cut, half), *_evenly(rest, half)]


def curve_charts(
    comparison: Comparison,
    arms: Sequence[ArmRecord],
    curves: Mapping[str, Mapping[str, Sequence[Point]]],
    keys: Sequence[str],
) -> list[Markup]:
    """A chart for each key that has a curve of two points or more; arms that were cut off end in a dashed line."""
    charts = [_curves(comparison, arms, curves, key) for key in keys]
    return [chart for chart in charts if chart is not None]


def _curves(
    comparison: Comparison, arms: Sequence[ArmRecord], curves: Mapping[str, Mapping[str, Sequence[Point]]], key: str
) -> Markup | None:
    lines = [(arm, points) for arm in arms if len(points := thinned(curves.get(arm.run_id, {}).get(key, []))) > 1]
    if not lines:
        return None
    ranks = sorted(
        {arm.params[RANK] for arm in comparison.arms if isinstance(arm.params.get(RANK), int | float)}, key=_number
    )
    by_rank = len(ranks) > 1
    values = [value for _, points in lines for _, value in points]
    # One diverged arm must not press the others onto one line.
    top = sorted(values)[math.ceil(0.98 * (len(values) - 1))]
    shown = [value for value in values if value <= top + (top - min(values))]
    name = "training loss" if key == "train.loss" else f"{title(key)} on the evaluation rows"
    averaged = any(len(curves[arm.run_id][key]) > _MOST_POINTS for arm, _ in lines)
    chart = Chart(
        title=name,
        x=axis("step", [step for _, points in lines for step, _ in points], room=0.02, whole=True),
        y=replace(metric_axis(key, shown), title=title(key).removeprefix("train.")),
        note="each point the mean of several steps" if averaged else "",
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


def thinned(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Steps and values; of many, means of neighbours, so that at most 80 are left."""
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
    """The effective rank of each layer's deltas, a line for each arm; None where no arm has an anatomy."""
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
    """Effective rank of all finished arms against r, with the line where the whole rank is used."""
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
        note="on the dashed line the whole rank would be used alike",
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
