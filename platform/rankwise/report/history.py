"""The history of a search as JSON and as an HTML page: its trials, their rounds and results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rankwise.evaluation.compare import Param, format_param, format_value, title
from rankwise.report.charts import Chart, axis
from rankwise.report.quality import metric_axis, value_axis
from rankwise.report.render import render
from rankwise.report.tables import Cell, Column, ReportRow

# Colour and style of the marks.
_STATES: Mapping[str, tuple[int | None, str]] = {"complete": (0, ""), "pruned": (4, ""), "unknown": (None, "hollow")}


@dataclass(frozen=True, kw_only=True)
class HistoryTrial:
    """One trial of a search.

    Attributes:
        number: Counted from 0, in the order in which arms were proposed.
        round: Counted from 0.
        spec_hash: The arm.
        label: The settings that distinguish it.
        values: What the search chose, by field path.
        state: `complete`, `pruned`, `unknown`, or `waiting` while it has not ended.
        value: The primary metric; of a pruned trial, the metric at its last rung.
        step: The step of that rung.
        run_id: The MLflow run, if any.
    """

    number: int
    round: int
    spec_hash: str
    label: str
    values: Mapping[str, Any]
    state: str
    value: float | None = None
    step: int | None = None
    run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class History:
    """All trials of a search so far."""

    experiment: str
    method: str
    primary_metric: str
    greater_is_better: bool
    trials: Sequence[HistoryTrial]
    rejected: int = 0
    """Points that were drawn but not used: equal to another one, or excluded by `where`."""

    @property
    def best_so_far(self) -> list[float | None]:
        """The best value of the complete trials after each trial; None before the first of them."""
        best: float | None = None
        values: list[float | None] = []
        for trial in self.trials:
            if trial.state == "complete" and trial.value is not None:
                better = max if self.greater_is_better else min
                best = trial.value if best is None else better(best, trial.value)
            values.append(best)
        return values

    def to_json(self) -> dict[str, object]:
        """Return the history as a dictionary."""
        return {
            "experiment": self.experiment,
            "method": self.method,
            "primary_metric": {"name": self.primary_metric, "greater_is_better": self.greater_is_better},
            "rejected": self.rejected,
            "trials": [
                {
                    "number": trial.number,
                    "round": trial.round,
                    "spec_hash": trial.spec_hash,
                    "run_id": trial.run_id,
                    "state": trial.state,
                    "value": trial.value,
                    "step": trial.step,
                    "best_so_far": best,
                    "parameters": dict(trial.values),
                }
                for trial, best in zip(self.trials, self.best_so_far, strict=True)
            ],
        }


def history_page(history: History) -> str:
    """Return an HTML page with values by trial and by parameter, the best so far, and all trials."""
    paths = list(history.trials[0].values) if history.trials else []
    shown = [trial for trial in history.trials if trial.value is not None and math.isfinite(trial.value)]
    charts = [_by_trial(history, shown), *(_by_value(history, shown, path) for path in paths)] if shown else []
    known = [best for best in history.best_so_far if best is not None]
    name = title(history.primary_metric)
    better = "greater" if history.greater_is_better else "smaller"
    counts: dict[str, int] = {}
    for trial in history.trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    states = ", ".join(f"{count:,} {state}" for state, count in counts.items())
    return render(
        "history.html.j2",
        page_title=f"{history.experiment}: search",
        experiment=history.experiment,
        method=history.method,
        headline=f"Best {name} so far: {format_value(history.primary_metric, known[-1])[0]}"
        if known
        else "No result yet.",
        facts=f"{len(history.trials):,} trials: {states}. Primary metric: {name}, {better} is better.",
        charts=charts,
        heads=[Column("trial"), Column("round"), Column("", "text"), Column(name), Column("step")]
        + [Column(path) for path in paths],
        rows=[_row(history, trial, paths) for trial in history.trials],
    )


def _by_trial(history: History, shown: Sequence[HistoryTrial]) -> Markup:
    last = len(history.trials) - 1
    chart = Chart(
        title=f"{title(history.primary_metric)} by trial",
        note="dashed lines separate the rounds" if history.trials[-1].round else "",
        x=axis("trial", [0.0, float(last)], whole=True),
        y=metric_axis(history.primary_metric, [trial.value for trial in shown if trial.value is not None]),
    )
    for before, after in zip(history.trials, history.trials[1:], strict=False):
        if after.round != before.round:
            at = before.number + 0.5
            chart.line([(at, chart.y.low), (at, chart.y.high)], colour=None, style="dashed")
    best = [(float(at), value) for at, value in enumerate(history.best_so_far) if value is not None]
    steps = best[:1]
    for at, value in best[1:]:
        steps += [(at, steps[-1][1]), (at, value)]
    chart.line(steps, colour=0)
    chart.legend("best so far", 0)
    _points(history, chart, shown, [float(trial.number) for trial in shown])
    return chart.draw()


def _by_value(history: History, shown: Sequence[HistoryTrial], path: str) -> Markup:
    values = [_coordinate(trial.values[path]) for trial in shown]
    places, x = value_axis(path, values)
    chart = Chart(
        title=f"by {path}",
        x=x,
        y=metric_axis(history.primary_metric, [trial.value for trial in shown if trial.value is not None]),
    )
    _points(history, chart, shown, [places[value] for value in values])
    return chart.draw()


def _points(history: History, chart: Chart, shown: Sequence[HistoryTrial], places: Sequence[float]) -> None:
    for trial, place in zip(shown, places, strict=True):
        colour, style = _STATES.get(trial.state, (None, "hollow"))
        at = f" at step {trial.step}" if trial.step is not None else ""
        value = format_value(history.primary_metric, trial.value)[0]
        tip = f"trial {trial.number}, round {trial.round + 1}, {trial.state}{at}: {value}; {trial.label}"
        assert trial.value is not None
        chart.point(place, trial.value, colour=colour, style=style, tip=tip)
        chart.legend(trial.state, colour, style)


def _row(history: History, trial: HistoryTrial, paths: Sequence[str]) -> ReportRow:
    cells = [
        Cell(text=str(trial.number)),
        Cell(text=str(trial.round + 1)),
        Cell(text=trial.state, kind="text", tag="finished" if trial.state == "complete" else trial.state),
        Cell(text=format_value(history.primary_metric, trial.value)[0]),
        Cell(text="" if trial.step is None else str(trial.step)),
        *(Cell(text=format_param(_coordinate(trial.values[path]))) for path in paths),
    ]
    return ReportRow(cells=cells)


def _coordinate(value: Any) -> Param:
    """Numbers and texts as they are, anything else as a text."""
    return value if isinstance(value, int | float | str) else json.dumps(value)
