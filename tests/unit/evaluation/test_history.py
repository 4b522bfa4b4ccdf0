from __future__ import annotations

import json

from rankwise.evaluation.history import History, HistoryTrial, history_plot
from rankwise.evaluation.plots import to_html


def trial(number: int, state: str, value: float | None = None, step: int | None = None, **values) -> HistoryTrial:
    chosen = {"lora.r": 2**number, "lora.target_modules": ["q", "v"], **values}
    return HistoryTrial(
        number=number, round=number // 2, spec_hash=f"{number:064x}", label=f"lora.r={2**number}", values=chosen,
        state=state, value=value, step=step, run_id=f"run{number}",
    )  # fmt: skip


def history(*, greater: bool = False) -> History:
    trials = (
        trial(0, "pruned", 3.0, 4),
        trial(1, "complete", 2.0),
        trial(2, "complete", 2.5),
        trial(3, "unknown"),
        trial(4, "complete", 1.5),
    )
    return History(
        experiment="a <b>",
        method="tpe",
        primary_metric="eval.loss",
        greater_is_better=greater,
        trials=trials,
        rejected=3,
    )


def test_the_table_has_every_trial_and_the_best_so_far():
    data = json.loads(json.dumps(history().to_json()))
    assert [each["best_so_far"] for each in data["trials"]] == [None, 2.0, 2.0, 2.0, 1.5]
    assert data["trials"][0] == {
        "number": 0, "round": 0, "spec_hash": "0" * 64, "run_id": "run0", "state": "pruned", "value": 3.0, "step": 4,
        "best_so_far": None, "parameters": {"lora.r": 1, "lora.target_modules": ["q", "v"]},
    }  # fmt: skip
    assert data["rejected"] == 3
    assert history(greater=True).best_so_far == [None, 2.0, 2.5, 2.5, 2.5]


def test_the_plot_has_a_point_for_every_value_and_a_line_between_rounds():
    figure = history_plot(history())
    line, *points = figure.data
    assert list(line.y) == [None, 2.0, 2.0, 2.0, 1.5]
    by_number = {trace.name: list(trace.x) for trace in points if trace.showlegend}
    assert by_number == {"complete": [1, 2, 4], "pruned": [0]}
    assert [shape.x0 for shape in figure.layout.shapes] == [1.5, 3.5]
    by_rank = next(trace for trace in points if trace.name == "complete" and trace.xaxis == "x2")
    assert list(by_rank.x) == [2, 4, 16]
    assert "at step 4" in next(trace for trace in points if trace.name == "pruned").hovertext[0]
    assert "<b>" not in figure.layout.title.text


def test_the_page_opens_without_a_network_and_an_empty_search_has_one_too():
    assert "cdn.plot.ly" not in to_html(history_plot(history())).split("</head>")[0]
    empty = History(experiment="x", method="tpe", primary_metric="eval.loss", greater_is_better=False, trials=())
    assert history_plot(empty).layout.title.text.startswith("x: search by tpe")
