"""Charts of the answer: differences to the largest rank with limits and margin, and how limits narrow with seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rankwise.evaluation.answer import Decision, Narrowing, RankOutcome
from rankwise.evaluation.answer_text import Answer, amount
from rankwise.evaluation.compare import title
from rankwise.report.charts import Chart, ChartAxis, axis

MOST_NARROWING = 8
_COLOURS: Mapping[str, int | None] = {"enough": 2, "not_enough": 1, "undecided": None, "reference": 0}
_NAMES = {"enough": "enough", "not_enough": "not enough", "undecided": "undecided", "reference": "the largest rank"}
# The dots of seeds stand beside the bar of limits: this factor to the left on the axis of ranks.
_BESIDE = 0.93
# Limits of few seeds may be a hundred times as wide as those of all; the axis ends at this many times the last ones.
_FAR = 3.0


def difference_chart(answer: Answer, decision: Decision) -> Markup:
    """Return D(r) against the rank: limits as bars, the margin as a band, seeds as dots, outcomes as colours."""
    assert answer.plan is not None, "a decision has a plan"
    margin, reference = answer.plan.margin, decision.reference
    ranks = [each.rank for each in decision.outcomes]
    values = [0.0, margin]
    for each in decision.outcomes:
        values += [value for value in (each.difference, each.lower, each.upper) if value is not None]
        values += each.by_seed.values()
    unit = amount(answer.key, 1.0).removeprefix("1").strip()
    y = _difference_axis(answer, values, f"worse than r = {reference.rank:g}" + (f" ({unit})" if unit else ""))
    chart = Chart(
        title=f"{title(answer.key)}: difference to r = {reference.rank:g}",
        x=axis("rank r", [ranks[0] * _BESIDE, *ranks], log=True, ticks=ranks),
        y=y,
        width=640,
        height=320,
        note=f"bars: one-sided limits that hold together at {100 * answer.plan.confidence:g} % confidence",
    )
    chart.band(y.low, margin, tip=f"within the margin: at most {amount(answer.key, margin)} worse")
    chart.level(margin, tip=f"margin {margin:g}")
    chart.line([(ranks[0] * _BESIDE, 0.0), (ranks[-1], 0.0)], colour=0, style="thin", tip=f"r = {reference.rank:g}")
    for each in decision.outcomes:
        for seed, value in each.by_seed.items():
            chart.point(
                each.rank * _BESIDE, value, colour=None, radius=2, style="faint",
                tip=f"r = {each.rank:g}, seed {seed}: {value:+.3g}",
            )  # fmt: skip
        if each.difference is not None:
            lower = -math.inf if each.lower is None else each.lower
            upper = math.inf if each.upper is None else each.upper
            chart.point(
                each.rank, each.difference, colour=_COLOURS[each.status], radius=5, tip=_tip(each),
                limits=None if each is reference else (lower, upper),
            )  # fmt: skip
    for status in dict.fromkeys(each.status for each in decision.outcomes):
        chart.legend(_NAMES[status], _COLOURS[status])
    if any(each.by_seed for each in decision.outcomes):
        chart.legend("one seed", None, "faint")
    return chart.draw()


def _tip(outcome: RankOutcome) -> str:
    if outcome.status == "reference":
        return f"r = {outcome.rank:g}: the largest rank, {outcome.seeds} seeds"
    ends = [NO_LIMIT if end is None else f"{end:+.3g}" for end in (outcome.lower, outcome.upper)]
    reason = f": {outcome.reason}" if outcome.reason else ""
    return (
        f"r = {outcome.rank:g}: {_NAMES[outcome.status]}{reason}; {outcome.difference:+.3g}, "
        f"limits {ends[0]} and {ends[1]}, {outcome.seeds} seeds"
    )


NO_LIMIT = "none"


def narrowing_charts(answer: Answer, decision: Decision) -> list[Markup]:
    """Return one chart per rank: its limits with the first 2, 3, ... seeds, and the margin."""
    assert answer.plan is not None, "a decision has a plan"
    if len(decision.narrowing) < 2:
        return []
    compared = [each for each in decision.outcomes if each.status != "reference"][:MOST_NARROWING]
    return [_narrowing(answer, decision.narrowing, k, each) for k, each in enumerate(compared)]


def _narrowing(answer: Answer, steps: Sequence[Narrowing], k: int, outcome: RankOutcome) -> Markup:
    assert answer.plan is not None, "a decision has a plan"
    margin, colour = answer.plan.margin, _COLOURS[outcome.status]
    known = [(step.seeds, step.lower[k], step.upper[k]) for step in steps if math.isfinite(step.upper[k])]
    last = known[-1][2] - known[-1][1] if known else margin
    middle = (known[-1][2] + known[-1][1]) / 2 if known else 0.0
    near = [middle - _FAR * last, middle + _FAR * last]
    values = [0.0, margin, *(min(max(end, near[0]), near[1]) for _, *ends in known for end in ends)]
    y = _difference_axis(answer, values, "worse by")
    chart = Chart(
        title=f"r = {outcome.rank:g}: {_NAMES[outcome.status]}",
        x=axis("number of seeds", [step.seeds for step in steps], whole=True),
        y=y,
    )
    chart.band(y.low, margin, tip=f"within the margin: at most {amount(answer.key, margin)} worse")
    chart.level(margin, tip=f"margin {margin:g}")
    for name, at in (("lower limit", 1), ("upper limit", 2)):
        line = [(float(step[0]), min(max(step[at], y.low), y.high)) for step in known]
        chart.line(line, colour=colour, tip=name)
        for step in known:
            if y.low <= step[at] <= y.high:
                tip = f"{step[0]} seeds: {name} {step[at]:+.3g}"
                chart.point(step[0], step[at], colour=colour, radius=2.5, tip=tip)
    return chart.draw()


def _difference_axis(answer: Answer, values: Sequence[float], name: str) -> ChartAxis:
    if amount(answer.key, 1.0).endswith("points"):
        return axis(name, values, text=lambda value: f"{100 * value:.4g}")
    return axis(name, values)
