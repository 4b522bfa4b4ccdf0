"""The history of a search: what was tried, in which round, and what came of it; as a table and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rankwise.evaluation.labels import title
from rankwise.evaluation.plots import COLOURS

COLUMNS = 3
_SYMBOLS = {"complete": "circle", "pruned": "x", "unknown": "circle-open"}


@dataclass(frozen=True, kw_only=True)
class HistoryTrial:
    """One trial of a search.

    Attributes:
        number: Counted from 0, in the order in which arms were proposed.
        round: Its round, counted from 0.
        spec_hash: Its arm.
        label: What sets it apart.
        values: What the search chose, by field path.
        state: `complete`, `pruned`, `unknown`, or `waiting` while it has not ended.
        value: The primary metric of a complete one; of a pruned one, the metric at its last rung.
        step: That rung.
        run_id: Its MLflow run, where there is one.
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
    """Points that were drawn in vain: equal to another one, or refused by `where`."""

    @property
    def best_so_far(self) -> list[float | None]:
        """After each trial, the best value of the complete ones; None before the first of them."""
        best: float | None = None
        values: list[float | None] = []
        for trial in self.trials:
            if trial.state == "complete" and trial.value is not None:
                better = max if self.greater_is_better else min
                best = trial.value if best is None else better(best, trial.value)
            values.append(best)
        return values

    def to_json(self) -> dict[str, object]:
        """The table."""
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


def history_plot(history: History) -> Any:
    """Values by trial, with the best so far and the borders of rounds; below, values by each parameter."""
    paths = list(history.trials[0].values) if history.trials else []
    rows = 1 + -(-len(paths) // COLUMNS)
    specs: list[list[Any]] = [[{"colspan": COLUMNS}] + [None] * (COLUMNS - 1)]
    specs += [[{}] * COLUMNS for _ in range(rows - 1)]
    figure = make_subplots(rows=rows, cols=COLUMNS, specs=specs, subplot_titles=["", *map(escape, paths)])
    numbers = [trial.number for trial in history.trials]
    figure.add_trace(
        go.Scatter(x=numbers, y=history.best_so_far, mode="lines", name="best so far", line={"color": COLOURS[1]}),
        row=1,
        col=1,
    )
    for state, symbol in _SYMBOLS.items():
        shown = [trial for trial in history.trials if trial.state == state and trial.value is not None]
        if shown:
            figure.add_trace(_points(shown, [trial.number for trial in shown], state, symbol, first=True), row=1, col=1)
        for index, path in enumerate(paths if shown else ()):
            place = {"row": 2 + index // COLUMNS, "col": 1 + index % COLUMNS}
            values = [_coordinate(trial.values[path]) for trial in shown]
            figure.add_trace(_points(shown, values, state, symbol, first=False), **place)
    for before, after in zip(history.trials, history.trials[1:], strict=False):
        if after.round != before.round:
            figure.add_vline(x=before.number + 0.5, line_dash="dot", line_color="#999999", row=1, col=1)
    figure.update_xaxes(title_text="trial", row=1, col=1)
    figure.update_yaxes(title_text=title(history.primary_metric), row=1, col=1)
    for index, path in enumerate(paths):
        if _spans_magnitudes([trial.values[path] for trial in history.trials]):
            figure.update_xaxes(type="log", row=2 + index // COLUMNS, col=1 + index % COLUMNS)
    better = "greater" if history.greater_is_better else "smaller"
    figure.update_layout(
        title=escape(f"{history.experiment}: search by {history.method} ({better} is better)"),
        template="plotly_white",
        height=360 * rows + 120,
        hoverlabel={"align": "left"},
    )
    return figure


def _points(trials: Sequence[HistoryTrial], x: Sequence[Any], state: str, symbol: str, *, first: bool) -> Any:
    return go.Scatter(
        x=list(x),
        y=[trial.value for trial in trials],
        mode="markers",
        name=state,
        legendgroup=state,
        showlegend=first,
        marker={"symbol": symbol, "size": 9, "color": [trial.number for trial in trials], "colorscale": "Viridis"},
        hovertext=[_hover(trial) for trial in trials],
        hoverinfo="text",
    )


def _hover(trial: HistoryTrial) -> str:
    at = f" at step {trial.step}" if trial.step is not None else ""
    lines = [f"trial {trial.number}, round {trial.round + 1}: {trial.state}{at}", f"{trial.value}", trial.label]
    return "<br>".join(map(escape, [*lines, f"arm {trial.spec_hash[:12]}"]))


def _coordinate(value: Any) -> Any:
    """Numbers as they are, anything else as a category."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number else value if isinstance(value, str) else json.dumps(value)


def _spans_magnitudes(values: Sequence[Any]) -> bool:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(values) and bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) > 20
