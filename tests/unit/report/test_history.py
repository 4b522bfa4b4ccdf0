from __future__ import annotations

import json
import re
from dataclasses import replace

from rankwise.report.history import History, HistoryTrial, history_page


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


def test_the_page_has_a_mark_for_every_value_and_a_line_between_rounds():
    page = history_page(history())
    by_trial, by_rank, by_modules = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    for figure in (by_trial, by_rank, by_modules):
        assert figure.count("<title>trial ") == 4
    assert by_trial.count('class="l cx dashed"') == 2
    assert "pruned at step 4: 3.000; lora.r=1" in by_trial
    assert "best so far" in by_trial
    assert "Best loss so far: 1.500" in page
    assert "a &lt;b&gt;: search by tpe" in page
    assert "<b>" not in page
    assert page.count("<tr") == 6


def test_a_search_without_results_has_a_page_too():
    empty = History(experiment="x", method="tpe", primary_metric="eval.loss", greater_is_better=False, trials=())
    page = history_page(empty)
    assert "x: search by tpe" in page
    assert "No result yet." in page
    waiting = replace(empty, trials=(trial(0, "waiting"),))
    assert "1 waiting" in history_page(waiting)
